// The 512-bit VNNI tile. Included inside a target region, after simd_avx512.h and kernels_impl.h.
//
//   vpdpbusd  zmm   16 columns x 4 channels: unsigned weight byte times signed activation byte, summed into int32
//
// A tile is 6 rows x 64 columns: 24 accumulators, 4 weights, one broadcast. The rests are added to the finished sums by
// its 16-bit sister, vpdpwssd.
#pragma once

namespace ocsquant {
namespace {

struct Narrow {
  __m512i total;
  OCSQ_INLINE Narrow() : total(_mm512_setzero_si512()) {}
  static OCSQ_INLINE void store(__m512i codes, uint8_t* out) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtsepi16_epi8(codes));
  }
  OCSQ_INLINE void operator()(__m512i codes, uint8_t* out) {
    store(codes, out);
    total = _mm512_dpwssd_epi32(total, codes, _mm512_set1_epi16(1));
  }
  static OCSQ_INLINE __m512i first(const int16_t* codes, int64_t count) {
    const uint32_t all = ~0u;
    return _mm512_maskz_loadu_epi16(static_cast<__mmask32>(count < 32 ? all >> (32 - count) : all), codes);
  }
  OCSQ_INLINE int32_t sum() const { return Simd::reduce_add(total); }
  static OCSQ_INLINE int32_t sum_bytes(const uint8_t* bytes, int64_t count) {
    __m512i sums = _mm512_setzero_si512();
    for (int64_t i = 0; i < count; i += 64) {
      sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_loadu_si512(bytes + i));
    }
    return Simd::reduce_add(sums);
  }
};

}  // namespace
}  // namespace ocsquant

#include "tile_vnni.h"
//
#include "plane_vnni.h"

namespace ocsquant {
namespace {

struct Factor : Picked<Bytes512> {
  explicit OCSQ_INLINE Factor(const Rest& rest) : Picked(rest) {}
  OCSQ_INLINE __m512i add(__m512i sums, __m512i bytes) const {
    return _mm512_dpwssd_epi32(sums, _mm512_shuffle_epi8(bytes, pick), value);
  }
};

struct Tile {
  static constexpr int kRows = 6;
  static constexpr int64_t kRowBlock = 192, kDepthBlock = 128, kDepthBlockFew = 1024;
  static constexpr int kVectors = kPanel / 16;
  static constexpr int64_t kPrefetch = 8192;

  static constexpr auto row_bytes = int8_row_bytes;
  static constexpr auto rest_capacity = outlier_rests;
  using Vec = Bytes512;
  using Factor = ocsquant::Factor;
  static_assert(kRows >= BytesOut::kRowsOfNotes);
  using Out = BytesOut;
  using Plane = BytesPlane;
  static constexpr auto place = placed;
  static constexpr auto add_rests = RestSums<Bytes512, Factor>::add_rests;
  static Offset offset(const uint8_t*) { return Offset::all; }
  // The ports that unpack have nothing else to do.
  static bool unpacks(const uint8_t*, int64_t) { return true; }

  static OCSQ_INLINE void fetch(const uint8_t* from, int lines, bool near) {
    for (int v = 0; v < lines; ++v) {
      if (near) {
        _mm_prefetch(reinterpret_cast<const char*>(from + 64 * v), _MM_HINT_T0);
      } else {
        _mm_prefetch(reinterpret_cast<const char*>(from + 64 * v), _MM_HINT_T1);
      }
    }
  }

  static constexpr bool kFewGroups = true;
  static constexpr int few_strip(int rows) { return rows <= 2 ? 4 : 2; }
  static OCSQ_INLINE __m512i dot(__m512i sums, __m512i weights, __m512i x) {
    return _mm512_dpbusd_epi32(sums, weights, x);
  }

  template <int R, class S>
  static OCSQ_INLINE void add_group(const CodeRows& a, const uint8_t* b, int g, const uint8_t* map,
                                    __m512i (&c)[R][kVectors]) {
    __m512i w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = S::load(b, g, 64 * v, map);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512i x = _mm512_set1_epi32(a.quad(i));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[i][v] = dot(c[i][v], w[v], x);
    }
  }

  template <int R, class S>
  static __attribute__((noinline)) void rows(CodeRows a, const Block& block, int32_t* sums) {
    __m512i c[R][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        c[i][v] = block.first ? _mm512_setzero_si512() : _mm512_loadu_si512(sums + i * kPanel + 16 * v);
      }
    }
    const uint8_t *b = block.weights, *next = block.next != nullptr ? block.next : b;
    if constexpr (S::kBytes) {
      for (int64_t g = 0; g < block.groups; ++g, b += kGroupBytes, next += kGroupBytes, a.first += kGroup) {
        // Few rows leave it to the CPU, which reads bytes faster when it is not told what comes.
        if constexpr (R > 4) fetch(next, kVectors, false);
        add_group<R, S>(a, b, 0, block.map, c);
      }
    } else if constexpr (R == 1) {
      // The four sums of one row would wait for one another: every second group has its own.
      __m512i odd[1][kVectors] = {};
      for (int64_t g = 0; g < block.groups; g += kSpan, b += S::kSpanBytes, a.first += kSpan * kGroup) {
        fetch(b + kPrefetch, static_cast<int>(S::kSpanBytes / 64), true);
        add_group<1, S>(a, b, 0, block.map, c);
        add_group<1, S>(a.from_group(1), b, 1, block.map, odd);
        add_group<1, S>(a.from_group(2), b, 2, block.map, c);
        add_group<1, S>(a.from_group(3), b, 3, block.map, odd);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[0][v] = _mm512_add_epi32(c[0][v], odd[0][v]);
    } else {
      for (int64_t g = 0; g < block.groups; g += kSpan, b += S::kSpanBytes, next += S::kSpanBytes) {
        fetch(R <= 4 ? b + kPrefetch : next, static_cast<int>(S::kSpanBytes / 64), R <= 4);
#pragma GCC unroll 4
        for (int i = 0; i < kSpan; ++i, a.first += kGroup) add_group<R, S>(a, b, i, block.map, c);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) _mm512_storeu_si512(sums + i * kPanel + 16 * v, c[i][v]);
    }
  }

  static void multiply(int count, const uint8_t* tile, int64_t depth, const Block& block, int32_t* sums) {
    run_stored<Bytes512, Tile>(block, count, CodeRows{tile, row_bytes(depth)}.from_group(block.first_group), block,
                               sums);
  }

  template <class S>
  static void run(int count, const CodeRows& a, const Block& block, int32_t* sums) {
    switch (count) {
      case 1:
        return rows<1, S>(a, block, sums);
      case 2:
        return rows<2, S>(a, block, sums);
      case 3:
        return rows<3, S>(a, block, sums);
      case 4:
        return rows<4, S>(a, block, sums);
      case 5:
        return rows<5, S>(a, block, sums);
      default:
        return rows<6, S>(a, block, sums);
    }
  }
};

}  // namespace
}  // namespace ocsquant

#include "few_groups_impl.h"
