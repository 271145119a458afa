// The vector type of the algorithms in *_impl.h, eight lanes. Included inside a target region.
#pragma once

#include "bytes_avx2.h"

namespace ocsquant {
namespace {

// For every mask of 8 lanes, which of them it keeps, in order.
struct KeptLanes {
  uint8_t lanes[256][8];
  constexpr KeptLanes() : lanes() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, kept = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask][kept++] = static_cast<uint8_t>(lane);
      }
    }
  }
};
constexpr KeptLanes kKept;

struct Simd {
  static constexpr auto look_up = look_up_bytes;
  static constexpr int W = 8;
  using F = __m256;
  using I = __m256i;
  static OCSQ_INLINE F load(const float* p) { return _mm256_loadu_ps(p); }
  // The first `count` values, then those of `rest`; nothing behind them is read.
  static OCSQ_INLINE F load_first(const float* p, int count, F rest) {
    const I place = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const I mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), place);
    return _mm256_blendv_ps(rest, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
  }
  static OCSQ_INLINE void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static OCSQ_INLINE F set1(float v) { return _mm256_set1_ps(v); }
  static OCSQ_INLINE F add(F a, F b) { return _mm256_add_ps(a, b); }
  static OCSQ_INLINE F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static OCSQ_INLINE F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static OCSQ_INLINE F div(F a, F b) { return _mm256_div_ps(a, b); }
  static OCSQ_INLINE F rint(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static OCSQ_INLINE F min(F a, F b) { return _mm256_min_ps(a, b); }
  static OCSQ_INLINE F max(F a, F b) { return _mm256_max_ps(a, b); }
  static OCSQ_INLINE F select_beyond(F q, F limit, F a, F b) {
    const F size = _mm256_castsi256_ps(abs_bits(q));
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(size, limit, _CMP_GT_OQ));
  }
  static OCSQ_INLINE F select_at_most(F a, F b, F x, F y) {
    return _mm256_blendv_ps(y, x, _mm256_cmp_ps(a, b, _CMP_LE_OQ));
  }

  // Lanes l and l + 4, then + 2, + 1.
  static OCSQ_INLINE float reduce_halves(F v) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
  }

  static OCSQ_INLINE I zero_i() { return _mm256_setzero_si256(); }
  static OCSQ_INLINE I set1_i(int32_t v) { return _mm256_set1_epi32(v); }
  static OCSQ_INLINE I load_i(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static OCSQ_INLINE I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
  static OCSQ_INLINE I mul_i(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static OCSQ_INLINE I widen_bytes(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static OCSQ_INLINE I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
  static OCSQ_INLINE F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static OCSQ_INLINE I abs_bits(F v) { return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff)); }
  static OCSQ_INLINE I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
  static OCSQ_INLINE uint32_t nonzero(I v) { return greater(v, zero_i()) | greater(zero_i(), v); }
  static OCSQ_INLINE uint32_t greater(I a, I b) {
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, b))));
  }
  // The lanes that have a bit, first, then anything to a whole vector; returns their number.
  static OCSQ_INLINE int keep(I v, uint32_t which, int32_t* to) {
    const __m128i order = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kKept.lanes[which]));
    const I kept = _mm256_permutevar8x32_epi32(v, _mm256_cvtepu8_epi32(order));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), kept);
    return __builtin_popcount(which);
  }
  static OCSQ_INLINE int32_t reduce_max(I v) {
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return _mm_cvtsi128_si32(_mm_max_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
  }
  static OCSQ_INLINE F power_of_two(F n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  static OCSQ_INLINE I round_to_int(F v) { return _mm256_cvtps_epi32(v); }
  // 16 codes in order, saturated to 16 bits.
  using Codes = __m256i;
  static OCSQ_INLINE Codes pack_codes(I a, I b) {
    return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);  // packs works per 128-bit half
  }
  static OCSQ_INLINE Codes set1_codes(int v) { return _mm256_set1_epi16(static_cast<int16_t>(v)); }
  static OCSQ_INLINE Codes sub_codes(Codes a, Codes b) { return _mm256_subs_epi16(a, b); }
  static OCSQ_INLINE Codes min_codes(Codes a, Codes b) { return _mm256_min_epi16(a, b); }
  static OCSQ_INLINE Codes max_codes(Codes a, Codes b) { return _mm256_max_epi16(a, b); }
  static OCSQ_INLINE bool all_greater(Codes a, Codes b) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi16(a, b))) == ~0u;
  }
  // kCodeBits bits for every code beyond +-limit.
  static constexpr int kCodeBits = 2;
  static OCSQ_INLINE Codes beyond(Codes codes, int limit) {
    return _mm256_cmpgt_epi16(_mm256_abs_epi16(codes), _mm256_set1_epi16(static_cast<int16_t>(limit)));
  }
  static OCSQ_INLINE uint32_t bits(Codes beyond) { return static_cast<uint32_t>(_mm256_movemask_epi8(beyond)); }
  static OCSQ_INLINE Codes count(Codes counts, Codes beyond) { return _mm256_sub_epi16(counts, beyond); }
  static OCSQ_INLINE int32_t reduce_codes(Codes codes) {
    return reduce_add(_mm256_madd_epi16(codes, _mm256_set1_epi16(1)));
  }
  static OCSQ_INLINE int32_t reduce_add(I v) {
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(h, _mm_shuffle_epi32(h, 0xb1)));
  }
  static OCSQ_INLINE void store_codes(int16_t* p, Codes codes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), codes);
  }
  static OCSQ_INLINE F load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static OCSQ_INLINE void store_bf16(uint16_t* p, F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i r = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    r = _mm256_srli_epi32(r, 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
};

}  // namespace
}  // namespace ocsquant
