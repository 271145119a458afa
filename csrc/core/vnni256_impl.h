// The 256-bit VNNI tile, compiled for AVX-VNNI and, so that CPUs with AVX-512 can test it, for AVX512-VNNI + VL: the
// two encodings of one instruction. OCSQ_DPBUSD and OCSQ_DPWSSD name it. Included inside a target region.
//
//   vpdpbusd  ymm   8 columns x 4 channels: unsigned weight byte times signed activation byte, summed into int32
//
// The rests are added to the finished sums by its 16-bit sister, vpdpwssd.
#pragma once

namespace ocsquant {
namespace {

struct Narrow {
  __m256i total;
  OCSQ_INLINE Narrow() : total(_mm256_setzero_si256()) {}
  static OCSQ_INLINE void store(__m256i codes, uint8_t* out) {
    const __m256i bodies = _mm256_permute4x64_epi64(_mm256_packs_epi16(codes, codes), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(bodies));
  }
  OCSQ_INLINE void operator()(__m256i codes, uint8_t* out) {
    store(codes, out);
    total = OCSQ_DPWSSD(total, codes, _mm256_set1_epi16(1));
  }
  static OCSQ_INLINE __m256i first(const int16_t* codes, int64_t count) {
    int16_t some[16] = {};
    std::memcpy(some, codes, (count < 16 ? count : 16) * sizeof(int16_t));
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(some));
  }
  OCSQ_INLINE int32_t sum() const { return Simd::reduce_add(total); }
  static OCSQ_INLINE int32_t sum_bytes(const uint8_t* bytes, int64_t count) {
    __m256i sums = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 32) {
      sums = OCSQ_DPBUSD(sums, _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i)));
    }
    return Simd::reduce_add(sums);
  }
};

}  // namespace
}  // namespace ocsquant

#include "strips.h"
#include "tile_vnni.h"
//
#include "plane_vnni.h"

namespace ocsquant {
namespace {

struct Factor : Picked<Bytes256> {
  explicit OCSQ_INLINE Factor(const Rest& rest) : Picked(rest) {}
  OCSQ_INLINE __m256i add(__m256i sums, __m256i bytes) const {
    return OCSQ_DPWSSD(sums, _mm256_shuffle_epi8(bytes, pick), value);
  }
};

struct Tile : Strips<Tile, CodeRows, Block> {
  static constexpr int kRows = 6;
  static constexpr int64_t kRowBlock = 192, kDepthBlock = 128, kDepthBlockFew = 64;

  static constexpr auto row_bytes = int8_row_bytes;
  static constexpr auto rest_capacity = outlier_rests;
  using Vec = Bytes256;
  using Factor = ocsquant::Factor;
  static_assert(kRows >= BytesOut::kRowsOfNotes);
  using Out = BytesOut;
  using Plane = BytesPlane;
  static constexpr auto place = placed;
  static constexpr auto add_rests = RestSums<Bytes256, Factor>::add_rests;
  static Offset offset(const uint8_t*) { return Offset::all; }
  static bool unpacks(const uint8_t*, int64_t rows) { return rows <= kFewRows; }

  static constexpr bool kFewGroups = true;
  static constexpr int64_t kPrefetch = 4096;
  static constexpr int few_strip(int rows) { return rows <= 2 ? 4 : 2; }
  static OCSQ_INLINE __m256i dot(__m256i sums, __m256i weights, __m256i x) { return OCSQ_DPBUSD(sums, weights, x); }
  static OCSQ_INLINE void fetch(const uint8_t* from, int lines, bool) {
    for (int v = 0; v < lines; ++v) _mm_prefetch(reinterpret_cast<const char*>(from + 64 * v), _MM_HINT_T0);
  }

  template <int R, int V, class S, bool kFetch>
  static OCSQ_INLINE void add_group(const CodeRows& a, const uint8_t* b, int g, const uint8_t* map, const uint8_t* next,
                                    __m256i (&c)[R][V]) {
    __m256i w[V];
    for (int v = 0; v < V && kFetch; v += 2) _mm_prefetch(reinterpret_cast<const char*>(next + 32 * v), _MM_HINT_T1);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) w[v] = S::load(b, g, 32 * v, map);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m256i x = _mm256_set1_epi32(a.quad(i));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) c[i][v] = OCSQ_DPBUSD(c[i][v], w[v], x);
    }
  }

  // R rows x 8 V columns.
  template <int R, int V, class S, bool kFetch>
  static OCSQ_INLINE void strip(CodeRows a, const uint8_t* b, const uint8_t* map, const uint8_t* next,
                                const Block& block, int32_t* sums) {
    __m256i c[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        c[i][v] = block.first ? _mm256_setzero_si256()
                              : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + i * kPanel + 8 * v));
      }
    }
    if constexpr (S::kBytes) {
      for (int64_t g = 0; g < block.groups; ++g, b += kGroupBytes, next += 32 * V, a.first += kGroup) {
        add_group<R, V, S, kFetch>(a, b, 0, map, next, c);
      }
    } else {
      for (int64_t g = 0; g < block.groups; g += kSpan, b += S::kSpanBytes) {
#pragma GCC unroll 4
        for (int i = 0; i < kSpan; ++i, next += 32 * V, a.first += kGroup) {
          add_group<R, V, S, kFetch>(a, b, i, map, next, c);
        }
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

  static void multiply(int count, const uint8_t* tile, int64_t depth, const Block& block, int32_t* sums) {
    run_stored<Bytes256, Tile>(block, count, CodeRows{tile, row_bytes(depth)}.from_group(block.first_group), block,
                               sums);
  }

  template <class S>
  static void run(int count, const CodeRows& a, const Block& block, int32_t* sums) {
    switch (count) {
      case 1:
        return rows<1, 8, S>(a, block, sums);
      case 2:
        return rows<2, 4, S>(a, block, sums);
      case 3:
        return rows<3, 4, S>(a, block, sums);
      case 4:
        return rows<4, 2, S>(a, block, sums);
      default:
        break;
    }
    if constexpr (S::kBytes) {
      return count == 5 ? rows<5, 2, S>(a, block, sums) : rows<6, 2, S>(a, block, sums);
    }
  }
};

}  // namespace
}  // namespace ocsquant

#include "few_groups_impl.h"
