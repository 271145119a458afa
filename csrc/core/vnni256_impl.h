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
  OCSQ_INLINE uint32_t operator()(const int16_t* codes, int count, uint8_t* out) {
    int16_t some[32] = {};
    if (count < 32) {
      for (int i = 0; i < count; ++i) some[i] = codes[i];
      codes = some;
    }
    const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), in_order(_mm256_packs_epi16(a, b)));
    const __m256i one = _mm256_set1_epi16(1);
    total = OCSQ_DPWSSD(OCSQ_DPWSSD(total, a, one), b, one);
    const __m256i beyond = _mm256_packs_epi16(beyond_byte(a), beyond_byte(b));
    return static_cast<uint32_t>(_mm256_movemask_epi8(in_order(beyond)));
  }
  OCSQ_INLINE int32_t sum() const { return Simd::reduce_add(total); }

 private:
  static OCSQ_INLINE __m256i in_order(__m256i packed) { return _mm256_permute4x64_epi64(packed, 0xd8); }
  static OCSQ_INLINE __m256i beyond_byte(__m256i code) {
    return _mm256_or_si256(_mm256_cmpgt_epi16(code, _mm256_set1_epi16(127)),
                           _mm256_cmpgt_epi16(_mm256_set1_epi16(-128), code));
  }
};

}  // namespace
}  // namespace ocsquant

#include "strips.h"
#include "tile_vnni.h"

namespace ocsquant {
namespace {

struct Tile : Strips<Tile, CodeRows, Block> {
  static constexpr int kRows = 6;
  static constexpr int64_t kRowBlock = 192, kDepthBlock = 128, kDepthBlockFew = 64;

  static constexpr auto row_bytes = int8_row_bytes;
  static constexpr auto rest_capacity = outlier_rests;
  static constexpr auto place = place_int8;
  static Offset offset(const uint8_t*) { return Offset::all; }
  static bool unpacks(const uint8_t*, int64_t rows) { return rows <= kFewRows; }

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

  static void add_rests(const Rest* rests, int32_t count, Panel& panel, int32_t* sums) {
    __m256i c[8];
    for (int v = 0; v < 8; ++v) c[v] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + 8 * v));
    for (int32_t r = 0; r < count; ++r) {
      const uint8_t* group = panel.group(rests[r].k / kGroup);
      const __m256i x = _mm256_set1_epi32(rests[r].value & 0xffff);
      const __m256i pick =
          _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kPicks[rests[r].k % kGroup])));
#pragma GCC unroll 8
      for (int v = 0; v < 8; ++v) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(group + 32 * v));
        c[v] = OCSQ_DPWSSD(c[v], _mm256_shuffle_epi8(bytes, pick), x);
      }
    }
    for (int v = 0; v < 8; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + 8 * v), c[v]);
  }
};

}  // namespace
}  // namespace ocsquant
