// AVX2 without a dot-product instruction.
//
//   vpmaddubsw  ymm   32 products of weight and activation bytes, summed in pairs to 16 bits
//   vpaddw      ymm   four of those, modulo 2^16
//   vpmaddwd    ymm   by ones: to 32 bits, once for the four
//   vpaddd      ymm
//
// 2.5 instructions for 32 products instead of the 4 of 16-bit operands, and exact: pairs cannot saturate
// (tile_pairs.h), and the sum of a span fits 16 bits where the norms of weights and activations say so (pack.h),
// whatever was lost of its parts. A span that they do not clear is widened after every product. The weights' offset is
// taken off in the same 16 bits: a sum starts at minus 128 times the lane's activations. Of weights of few bits 16 bits
// hold the sums of several spans in any case; their offset is taken off the 32-bit sums.
#if defined(__x86_64__)
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "isa.h"
#include "kernels.h"
#include "pack.h"

OCSQ_TARGET_BEGIN("avx2")
#include "simd_avx2.h"
//
#include "kernels_impl.h"
#include "strips.h"
#include "tile_int16.h"
#include "tile_pairs.h"

namespace ocsquant {
namespace {

struct PairRun : Block {
  int64_t together;     // spans whose sums 16 bits hold, whatever they are; 0: that depends on the span
  const uint8_t* fits;  // then for every span whether they do
  int32_t take_off[4];  // for every row what takes the weights' offset off the spans that do not do so themselves
};

OCSQ_INLINE __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
OCSQ_INLINE __m256i load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
OCSQ_INLINE void store(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

// One row's quad times two vectors of weights. By hand: from intrinsics GCC 12 hoists the broadcasts of a step above
// the products, spills the sums, and is a fifth slower.
struct Quad {
  uint8_t bytes[kGroup];
};
OCSQ_INLINE const Quad& quad(const uint8_t* p) { return *reinterpret_cast<const Quad*>(p); }

// 16-bit sums from minus the weights' offset times the lanes' activations on.
OCSQ_INLINE void start16(__m256i (&sum)[2], const __m256i (&w)[2], const Quad& a, const Quad& minus_lanes,
                         __m128i offset_bits) {
  __m256i x, product;
  __asm__ volatile(
      "vpbroadcastd %[lanes], %[sum0]\n\tvpbroadcastd %[a], %[x]\n\tvpsllw %[bits], %[sum0], %[sum0]\n\t"
      "vpmaddubsw %[x], %[w0], %[product]\n\tvpmaddubsw %[x], %[w1], %[x]\n\t"
      "vpaddw %[x], %[sum0], %[sum1]\n\tvpaddw %[product], %[sum0], %[sum0]"
      : [sum0] "=&x"(sum[0]), [sum1] "=&x"(sum[1]), [x] "=&x"(x), [product] "=&x"(product)
      : [w0] "x"(w[0]), [w1] "x"(w[1]), [a] "m"(a), [lanes] "m"(minus_lanes), [bits] "x"(offset_bits));
}
OCSQ_INLINE void first16(__m256i (&sum)[2], const __m256i (&w)[2], const Quad& a) {
  __m256i x;
  __asm__ volatile("vpbroadcastd %[a], %[x]\n\tvpmaddubsw %[x], %[w0], %[sum0]\n\tvpmaddubsw %[x], %[w1], %[sum1]"
                   : [sum0] "=&x"(sum[0]), [sum1] "=&x"(sum[1]), [x] "=&x"(x)
                   : [w0] "x"(w[0]), [w1] "x"(w[1]), [a] "m"(a));
}
OCSQ_INLINE void add16(__m256i (&sum)[2], const __m256i (&w)[2], const Quad& a) {
  __m256i x, product;
  __asm__ volatile(
      "vpbroadcastd %[a], %[x]\n\tvpmaddubsw %[x], %[w0], %[product]\n\tvpmaddubsw %[x], %[w1], %[x]\n\t"
      "vpaddw %[product], %[sum0], %[sum0]\n\tvpaddw %[x], %[sum1], %[sum1]"
      : [sum0] "+x"(sum[0]), [sum1] "+x"(sum[1]), [x] "=&x"(x), [product] "=&x"(product)
      : [w0] "x"(w[0]), [w1] "x"(w[1]), [a] "m"(a));
}
OCSQ_INLINE void add32(__m256i (&sum)[2], const __m256i (&w)[2], const Quad& a, __m256i ones) {
  __m256i x, product;
  __asm__ volatile(
      "vpbroadcastd %[a], %[x]\n\tvpmaddubsw %[x], %[w0], %[product]\n\tvpmaddubsw %[x], %[w1], %[x]\n\t"
      "vpmaddwd %[ones], %[product], %[product]\n\tvpmaddwd %[ones], %[x], %[x]\n\t"
      "vpaddd %[product], %[sum0], %[sum0]\n\tvpaddd %[x], %[sum1], %[sum1]"
      : [sum0] "+x"(sum[0]), [sum1] "+x"(sum[1]), [x] "=&x"(x), [product] "=&x"(product)
      : [w0] "x"(w[0]), [w1] "x"(w[1]), [a] "m"(a), [ones] "x"(ones));
}

OCSQ_INLINE void add_int16(__m256i (&sum)[2], const __m256i (&w)[2], __m256i x) {
  __m256i product;
  __asm__ volatile(
      "vpmaddwd %[x], %[w0], %[product]\n\tvpaddd %[product], %[sum0], %[sum0]\n\t"
      "vpmaddwd %[x], %[w1], %[product]\n\tvpaddd %[product], %[sum1], %[sum1]"
      : [sum0] "+x"(sum[0]), [sum1] "+x"(sum[1]), [product] "=&x"(product)
      : [w0] "x"(w[0]), [w1] "x"(w[1]), [x] "x"(x));
}

struct Factor : Picked<Bytes256> {
  explicit OCSQ_INLINE Factor(const Rest& rest) : Picked(rest) {}
  OCSQ_INLINE __m256i add(__m256i sums, __m256i bytes) const {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_shuffle_epi8(bytes, pick), value));
  }
};

struct Tile : Strips<Tile, const uint8_t*, PairRun>, PairTile {
  static constexpr int kRows = 4;
  static constexpr int64_t kRowBlock = 192, kDepthBlock = 256, kDepthBlockFew = 64;

  static constexpr bool kFewGroups = false;
  using Out = RowOut;
  using Plane = CodesPlane;

  // The weights of a span times R rows: what(sum, w, row, g, i) for each pair of vectors.
  template <int R, int P, class S, class What>
  static OCSQ_INLINE void over_span(const uint8_t* span, const uint8_t* b, const uint8_t* map, __m256i (&h)[P][R][2],
                                    const What& what) {
#pragma GCC unroll 4
    for (int g = 0; g < kSpan; ++g) {
      const uint8_t* a = span + (1 + g) * R * kGroup;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const __m256i w[2] = {S::load(b, g, 64 * p, map), S::load(b, g, 64 * p + 32, map)};
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) what(h[p][i], w, quad(a + i * kGroup), g, i);
      }
    }
  }

  // 16-bit sums, added to 32-bit sums in memory.
  template <int R, int P>
  static OCSQ_INLINE void widen16(const __m256i (&h)[P][R][2], int32_t* sums) {
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          int32_t* at = sums + i * kPanel + 16 * p + 8 * v;
          store(at, _mm256_add_epi32(load(at), _mm256_madd_epi16(h[p][i][v], ones)));
        }
      }
    }
  }

  // A span that 16-bit sums hold without its offset.
  template <int R, int P, class S>
  static OCSQ_INLINE void add_span16(const uint8_t* span, const uint8_t* b, const uint8_t* map, __m128i offset_bits,
                                     int32_t* sums) {
    __m256i h[P][R][2];
    over_span<R, P, S>(span, b, map, h,
                       [&](__m256i(&sum)[2], const __m256i(&w)[2], const Quad& row, int g, int i)
                           __attribute__((always_inline)) {
                             g == 0 ? start16(sum, w, row, quad(span + i * kGroup), offset_bits) : add16(sum, w, row);
                           });
    widen16<R, P>(h, sums);
  }

  // Spans that they hold together, the offset included; that stays in.
  template <int R, int P, class S>
  static OCSQ_INLINE void add_together(const uint8_t* span, const uint8_t* b, const uint8_t* map, int64_t count,
                                       int32_t* sums) {
    __m256i h[P][R][2];
    over_span<R, P, S>(span, b, map, h,
                       [](__m256i(&sum)[2], const __m256i(&w)[2], const Quad& row, int g, int)
                           __attribute__((always_inline)) { g == 0 ? first16(sum, w, row) : add16(sum, w, row); });
    while (--count > 0) {
      span += span_bytes(R);
      b += S::kSpanBytes;
      over_span<R, P, S>(span, b, map, h,
                         [](__m256i(&sum)[2], const __m256i(&w)[2], const Quad& row, int, int)
                             __attribute__((always_inline)) { add16(sum, w, row); });
    }
    widen16<R, P>(h, sums);
  }

  // Any span, added to 32-bit sums; the offset stays in.
  template <int R, int P, class S>
  static OCSQ_INLINE void add_span32(const uint8_t* span, const uint8_t* b, const uint8_t* map, int64_t groups,
                                     __m256i (&c)[P][R][2]) {
    const __m256i ones = _mm256_set1_epi16(1);
    const uint8_t* a = span + R * kGroup;
#pragma GCC unroll 4
    for (int g = 0; g < kSpan; ++g, a += R * kGroup) {
      if (g >= groups) return;
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        const __m256i w[2] = {S::load(b, g, 64 * p, map), S::load(b, g, 64 * p + 32, map)};
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) add32(c[p][i], w, quad(a + i * kGroup), ones);
      }
    }
  }

  // R rows x 8 V columns.
  template <int R, int V, class S, bool kFetch>
  static OCSQ_INLINE void strip(const uint8_t* span, const uint8_t* b, const uint8_t* map, const uint8_t* next,
                                const PairRun& run, int32_t* sums) {
    constexpr int P = V / 2;
    for (int i = 0; i < R; ++i) {
      const __m256i from = _mm256_set1_epi32(run.take_off[i]);
      for (int v = 0; v < V; ++v) {
        int32_t* at = sums + i * kPanel + 8 * v;
        store(at, run.first ? from : _mm256_add_epi32(load(at), from));
      }
    }
    const int64_t spans = (run.groups + kSpan - 1) / kSpan;
    const __m128i offset_bits = _mm_cvtsi32_si128(__builtin_ctz(run.offset));
    int64_t s = 0;
    const auto advance = [&](int64_t count = 1) __attribute__((always_inline)) {
      for (int v = 0; v < count * V * kSpan && kFetch; v += 2) {
        _mm_prefetch(reinterpret_cast<const char*>(next + 32 * v), _MM_HINT_T1);
      }
      s += count;
      span += count * span_bytes(R);
      b += count * S::kSpanBytes;
      next += count * 32 * V * kSpan;
    };
    for (const int64_t complete = run.together > 0 ? run.groups / kSpan : 0; s < complete;) {
      const int64_t count = complete - s < run.together ? complete - s : run.together;
      add_together<R, P, S>(span, b, map, count, sums);
      advance(count);
    }
    while (s < spans) {
      if (run.fits[s]) {
        add_span16<R, P, S>(span, b, map, offset_bits, sums);
        advance();
        continue;
      }
      __m256i c[P][R][2];
      const auto at = [&](int p, int i, int v)
                          __attribute__((always_inline)) { return sums + i * kPanel + 16 * p + 8 * v; };
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) c[p][i][0] = load(at(p, i, 0)), c[p][i][1] = load(at(p, i, 1));
      }
      do {
        const int64_t left = run.groups - s * kSpan;
        if (left >= kSpan) {
          add_span32<R, P, S>(span, b, map, kSpan, c);
        } else {
          add_span32<R, P, S>(span, b, map, left, c);
        }
        advance();
      } while (s < spans && !run.fits[s]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) store(at(p, i, 0), c[p][i][0]), store(at(p, i, 1), c[p][i][1]);
      }
    }
  }

  // Of a span a lane adds up half the channels: each a byte below twice the offset, times kLimit at most.
  static int64_t spans_together(int offset) {
    return std::numeric_limits<int16_t>::max() / (kChannels / 2 * kLimit * (2 * offset - 1));
  }

  // What 16-bit sums hold; the spans whose norms allow it are cleared.
  static PairRun plan(const uint8_t* tile, const uint8_t* span, int rows, const Block& block, uint8_t* fits) {
    const int64_t complete = block.groups / kSpan, together = spans_together(block.offset);
    if (together > 0) {
      std::memset(fits, 0, (block.groups + kSpan - 1) / kSpan);
    } else {
      clear_fitting(tile, block, complete, fits);
    }
    __m128i offset = _mm_setzero_si128();
    for (int64_t s = 0; s * kSpan < block.groups; ++s, span += span_bytes(rows)) {
      if (fits[s]) continue;
      const __m128i minus_lanes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(span));
      offset = _mm_add_epi32(offset, _mm_madd_epi16(minus_lanes, _mm_set1_epi16(static_cast<int16_t>(block.offset))));
    }
    PairRun run = {block, together, fits, {}};
    _mm_storeu_si128(reinterpret_cast<__m128i*>(run.take_off), offset);
    return run;
  }

  static void clear_fitting(const uint8_t* tile, const Block& block, int64_t complete, uint8_t* fits) {
    const uint8_t* norms = bounds(tile) + block.first_group / kSpan;
    __m256i count = _mm256_setzero_si256();
    int64_t s = 0;
    for (; s + 16 <= complete; s += 16) {
      const __m256i product = _mm256_mullo_epi16(load_u8(norms + s), load_u8(block.bounds + s));
      const __m256i fit = _mm256_srli_epi16(_mm256_cmpgt_epi16(_mm256_set1_epi16(kMaxHalfNorms + 1), product), 15);
      count = _mm256_add_epi16(count, fit);
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(fit), _mm256_extracti128_si256(fit, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(fits + s), bytes);
    }
    int64_t fitting = Simd::reduce_add(_mm256_madd_epi16(count, _mm256_set1_epi16(1)));
    for (; s < complete; ++s) fitting += fits[s] = norms[s] * block.bounds[s] <= kMaxHalfNorms;
    // A change from one to the other costs more than a few spans save.
    if (4 * fitting < 3 * complete) std::memset(fits, 0, complete);
    if (complete * kSpan < block.groups) fits[complete] = false;
  }

  static constexpr auto add_rests = RestSums<Bytes256, Factor>::add_rests;
  static bool unpacks(const uint8_t* tile, int64_t rows) { return rows <= kFewRows && !is_wide(tile); }

  // The int16 tile: 8 columns at a time, 4 columns x 4 channels in a vector. The offset stays in.
  template <int R>
  static __attribute__((noinline)) void rows16(const int16_t* tile, const Block& block, int32_t* sums) {
    for (int64_t j = 0; j < block.width; j += 8) {
      const int16_t* a = tile;
      const uint8_t* b = block.weights + j * kGroup;
      __m256i c[R][2];
      for (auto& row : c) row[0] = row[1] = _mm256_setzero_si256();
      for (int64_t g = 0; g < block.groups; ++g, b += kGroupBytes) {
        const __m256i w[2] = {load_u8(b), load_u8(b + 16)};
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i, a += kGroup) {
          int64_t quad;
          std::memcpy(&quad, a, sizeof(quad));
          const __m256i x = _mm256_set1_epi64x(quad);
          add_int16(c[i], w, x);
        }
      }
      for (int i = 0; i < R; ++i) {
        __m256i s = _mm256_permute4x64_epi64(_mm256_hadd_epi32(c[i][0], c[i][1]), 0xd8);
        int32_t* at = sums + i * kPanel + j;
        store(at, block.first ? s : _mm256_add_epi32(s, load(at)));
      }
    }
  }

  static void multiply(int count, const uint8_t* tile, int64_t depth, const Block& block, int32_t* sums) {
    if (is_wide(tile)) {
      const int16_t* a = wide_codes(tile) + block.first_group * kGroup * count;
      switch (count) {
        case 1:
          return rows16<1>(a, block, sums);
        case 2:
          return rows16<2>(a, block, sums);
        case 3:
          return rows16<3>(a, block, sums);
        default:
          return rows16<4>(a, block, sums);
      }
    }
    uint8_t fits[kDepthBlock / kSpan];
    const uint8_t* a = tile + header_bytes(depth) + block.first_group / kSpan * span_bytes(count);
    const PairRun run = plan(tile, a, count, block, fits);
    run_stored<Bytes256, Tile>(block, count, a, run, sums);
  }

  template <class S>
  static void run(int count, const uint8_t* a, const PairRun& run, int32_t* sums) {
    switch (count) {
      case 1:
        return rows<1, 8, S>(a, run, sums);
      case 2:
        return rows<2, 4, S>(a, run, sums);
      case 3:
        return rows<3, 2, S>(a, run, sums);
      default:
        return rows<4, 2, S>(a, run, sums);
    }
  }
};

}  // namespace
}  // namespace ocsquant
OCSQ_TARGET_END

namespace ocsquant {
const Kernels kAvx2 = kernels<Tile>("avx2");
}  // namespace ocsquant
#endif
