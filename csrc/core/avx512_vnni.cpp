// AVX-512 with VNNI.
//
//   vpdpbusd  zmm   16 columns x 4 channels: unsigned weight byte times signed activation byte, summed into int32
//
// A tile is 6 rows x 64 columns: 24 accumulators, 4 weights, one broadcast. The rests are added to the finished sums by
// the same instruction.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"
#include "kernels.h"

OCSQ_TARGET_BEGIN("avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
#include "simd_avx512.h"
//
#include "kernels_impl.h"

namespace ocsquant {
namespace {

struct Narrow {
  static OCSQ_INLINE bool block(const int16_t* codes, int8_t* out) {
    const __m512i code = _mm512_loadu_si512(codes);
    const __m256i body = _mm512_cvtsepi16_epi8(code);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), body);
    return _mm512_cmpneq_epi16_mask(_mm512_cvtepi8_epi16(body), code) != 0;
  }
};

}  // namespace
}  // namespace ocsquant

#include "tile_vnni.h"

namespace ocsquant {
namespace {

struct Tile {
  static constexpr int kRows = 6;
  static constexpr int64_t kRowBlock = 192, kDepthBlock = 128, kDepthBlockFew = 1024;
  static constexpr int kVectors = kPanel / 16;
  static constexpr int64_t kPrefetch = 4096;

  static int64_t row_bytes(int64_t depth) { return depth; }
  static constexpr auto rest_capacity = outlier_rests;
  static constexpr auto place = place_int8;
  static Offset offset(const uint8_t*) { return Offset::all; }

  template <int R>
  static __attribute__((noinline)) void rows(const uint8_t* a, const Block& block, int32_t* sums) {
    __m512i c[R][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        c[i][v] = block.first ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + i * kPanel + 16 * v);
      }
    }
    const uint8_t* b = block.weights;
    for (int64_t g = 0; g < block.groups; ++g, b += kGroupBytes, a += R * kGroup) {
      __m512i w[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        w[v] = _mm512_loadu_si512(b + 64 * v);
        // Few rows read the weights at memory speed, wherever the block ends.
        const int64_t distance = R <= 4 ? kPrefetch : block.ahead;
        _mm_prefetch(reinterpret_cast<const char*>(b + 64 * v + distance), R <= 4 ? _MM_HINT_T0 : _MM_HINT_T1);
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        int32_t quad;
        std::memcpy(&quad, a + i * kGroup, sizeof(quad));
        const __m512i x = _mm512_set1_epi32(quad);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) c[i][v] = _mm512_dpbusd_epi32(c[i][v], w[v], x);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(sums + i * kPanel + 16 * v, c[i][v]);
    }
  }

  static void multiply(int count, const uint8_t* tile, int64_t, const Block& block, int32_t* sums) {
    const uint8_t* a = tile + block.first_group * kGroup * count;
    switch (count) {
      case 1:
        return rows<1>(a, block, sums);
      case 2:
        return rows<2>(a, block, sums);
      case 3:
        return rows<3>(a, block, sums);
      case 4:
        return rows<4>(a, block, sums);
      case 5:
        return rows<5>(a, block, sums);
      default:
        return rows<6>(a, block, sums);
    }
  }

  static void add_rests(const Rest* rests, int32_t count, const uint8_t* panel, int32_t* sums) {
    __m512i c[kVectors];
    for (int v = 0; v < kVectors; ++v) c[v] = _mm512_loadu_si512(sums + 16 * v);
    for (int32_t r = 0; r < count; ++r) {
      const uint8_t* group = panel + rests[r].k / kGroup * kGroupBytes;
      for (int left = rests[r].value; left != 0; left -= rest_step(left)) {
        const __m512i x = _mm512_set1_epi32(rest_quad(rests[r], rest_step(left)));
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          c[v] = _mm512_dpbusd_epi32(c[v], _mm512_loadu_si512(group + 64 * v), x);
        }
      }
    }
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(sums + 16 * v, c[v]);
  }
};

}  // namespace
}  // namespace ocsquant
OCSQ_TARGET_END

namespace ocsquant {
const Kernels kAvx512Vnni = kernels<Tile>("avx512_vnni");
}  // namespace ocsquant
#endif
