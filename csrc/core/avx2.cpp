// AVX2 without a dot-product instruction.
//
//   vpmovsxbw  ymm, m128   16 weight codes to 16 bits
//   vpmaddwd   ymm         16 products, summed in pairs to 32 bits: exact, where vpmaddubsw would saturate
//   vphaddd    ymm         the two partial sums of a column, once per block
//
// A vector holds 4 columns x 4 channels; the activation's 4 channels are one 64-bit broadcast. Activation codes are 16
// bits wide, so run-time OCS costs nothing in the product: an outlier's code is simply a larger number.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"
#include "kernels.h"

OCSQ_TARGET_BEGIN("avx2")
#include "simd_avx2.h"
//
#include "rowwise_impl.h"
//
#include "linear_impl.h"
#include "strips.h"
#include "tile_int16.h"

namespace ocsquant {
namespace {

struct Tile : Strips<Tile, int16_t, 4> {
  using Code = int16_t;
  static constexpr int kRows = 6;
  static constexpr bool kUnsigned = false;
  static constexpr int64_t kRowBlock = 96, kDepthBlock = 256, kDepthBlockFew = 64;

  static void place(int16_t* codes, int64_t pitch, int rows, int64_t depth, Code* out, Rest*, int32_t* counts,
                    int64_t) {
    place_int16(codes, pitch, rows, depth, out);
    for (int i = 0; i < rows; ++i) counts[i] = 0;
  }

  // By hand: from intrinsics GCC 12 hoists all broadcasts of a step above the products and spills the accumulators.
  static OCSQ_INLINE void multiply_add(__m256i& sum, __m256i x, __m256i w) {
    __m256i product;
    __asm__ volatile("vpmaddwd %[w], %[x], %[product]\n\tvpaddd %[product], %[sum], %[sum]"
                     : [sum] "+x"(sum), [product] "=&x"(product)
                     : [x] "x"(x), [w] "x"(w));
  }

  // R rows x 4 V columns.
  template <int R, int V, bool kFetch>
  static OCSQ_INLINE void strip(const int16_t* a, const int8_t* b, const int8_t* next, const Block& block,
                                int32_t* sums) {
    __m256i c[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) c[i][v] = _mm256_setzero_si256();
    }
    for (int64_t g = 0; g < block.groups; ++g, b += kGroupBytes, next += 16 * V, a += R * kGroup) {
      __m256i w[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        if (kFetch && v % 4 == 0) _mm_prefetch(reinterpret_cast<const char*>(next + 16 * v), _MM_HINT_T1);
        w[v] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b + 16 * v)));
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        int64_t quad;
        std::memcpy(&quad, a + i * kGroup, sizeof(quad));
        const __m256i x = _mm256_set1_epi64x(quad);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) multiply_add(c[i][v], x, w[v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v += 2) {
        __m256i s = _mm256_permute4x64_epi64(_mm256_hadd_epi32(c[i][v], c[i][v + 1]), 0xd8);
        __m256i* at = reinterpret_cast<__m256i*>(sums + i * kPanel + 4 * v);
        if (!block.first) s = _mm256_add_epi32(s, _mm256_loadu_si256(at));
        _mm256_storeu_si256(at, s);
      }
    }
  }
};

}  // namespace
}  // namespace ocsquant
OCSQ_TARGET_END

namespace ocsquant {
const Kernels kAvx2 = {"avx2", linear_kernels<Tile>(), kFakeQuantize, widen, narrow};
}  // namespace ocsquant
#endif
