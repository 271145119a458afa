// The 256-bit VNNI tile, compiled for AVX-VNNI and, so that CPUs with AVX-512 can test it, for AVX512-VNNI + VL: the
// two encodings of one instruction. OCSQ_DPBUSD names it. Included inside a target region.
//
//   vpdpbusd  ymm   8 columns x 4 channels: unsigned activation byte times signed weight byte, summed into int32
//
// The rest of an outlier is added to the finished sums by the same instruction, in steps of at most 255.
#pragma once

namespace ocsquant {
namespace {

struct Narrow {
  static OCSQ_INLINE bool block(const int16_t* codes, uint8_t* out) {
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 16));
    const __m256i body = _mm256_permute4x64_epi64(_mm256_packs_epi16(a, b), 0xd8);
    const __m256i byte = _mm256_xor_si256(body, _mm256_set1_epi8(-128));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), byte);
    const __m256i top = _mm256_set1_epi16(127), bottom = _mm256_set1_epi16(-128);
    const __m256i over = _mm256_or_si256(_mm256_cmpgt_epi16(a, top), _mm256_cmpgt_epi16(b, top));
    const __m256i under = _mm256_or_si256(_mm256_cmpgt_epi16(bottom, a), _mm256_cmpgt_epi16(bottom, b));
    const __m256i any = _mm256_or_si256(over, under);
    return !_mm256_testz_si256(any, any);
  }
};

}  // namespace
}  // namespace ocsquant

#include "strips.h"
#include "tile_vnni.h"

namespace ocsquant {
namespace {

struct Tile : Strips<Tile, uint8_t, 8> {
  using Code = uint8_t;
  static constexpr int kRows = 6;
  static constexpr bool kUnsigned = true;
  static constexpr int64_t kRowBlock = 192, kDepthBlock = 128, kDepthBlockFew = 64;

  static void place(int16_t* codes, int64_t pitch, int rows, int64_t depth, Code* out, Rest* rests, int32_t* counts,
                    int64_t capacity) {
    place_uint8(codes, pitch, rows, depth, out, rests, counts, capacity);
  }

  // R rows x 8 V columns.
  template <int R, int V, bool kFetch>
  static OCSQ_INLINE void strip(const uint8_t* a, const int8_t* b, const int8_t* next, const Block& block,
                                int32_t* sums) {
    __m256i c[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        c[i][v] = block.first ? _mm256_setzero_si256()
                              : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + i * kPanel + 8 * v));
      }
    }
    for (int64_t g = 0; g < block.groups; ++g, b += kGroupBytes, next += 32 * V, a += R * kGroup) {
      __m256i w[V];
      for (int v = 0; v < V && kFetch; v += 2) _mm_prefetch(reinterpret_cast<const char*>(next + 32 * v), _MM_HINT_T1);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) w[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b + 32 * v));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        int32_t quad;
        std::memcpy(&quad, a + i * kGroup, sizeof(quad));
        const __m256i x = _mm256_set1_epi32(quad);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) c[i][v] = OCSQ_DPBUSD(c[i][v], x, w[v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + i * kPanel + 8 * v), c[i][v]);
      }
    }
  }

  static OCSQ_INLINE void add_rest(const Rest& rest, const int8_t* group, int32_t* sums) {
    const int shift = 8 * (rest.k % kGroup);
    for (int64_t j = 0; j < kPanel; j += 8) {
      const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + j * kGroup));
      __m256i part = _mm256_setzero_si256();
      for (int left = rest.value < 0 ? -rest.value : rest.value; left > 0; left -= 255) {
        const uint32_t step = static_cast<uint32_t>(left > 255 ? 255 : left) << shift;
        part = OCSQ_DPBUSD(part, _mm256_set1_epi32(static_cast<int32_t>(step)), w);
      }
      __m256i* at = reinterpret_cast<__m256i*>(sums + j);
      const __m256i sum = _mm256_loadu_si256(at);
      _mm256_storeu_si256(at, rest.value < 0 ? _mm256_sub_epi32(sum, part) : _mm256_add_epi32(sum, part));
    }
  }
};

}  // namespace
}  // namespace ocsquant
