// The vector type of the algorithms in *_impl.h, sixteen lanes. Included inside a target region.
#pragma once

#include "bytes_avx2.h"

namespace ocsquant {
namespace {

struct Bytes512 {
  using V = __m512i;
  static OCSQ_INLINE V load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static OCSQ_INLINE void store(uint8_t* p, V v) { _mm512_storeu_si512(p, v); }
  // 16 bytes, again and again.
  static OCSQ_INLINE V repeat(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static OCSQ_INLINE V all(int byte) { return _mm512_set1_epi8(static_cast<char>(byte)); }
  static OCSQ_INLINE V add(V a, V b) { return _mm512_add_epi8(a, b); }
  static OCSQ_INLINE V both(V a, V b) { return _mm512_and_si512(a, b); }
  static OCSQ_INLINE V either(V a, V b) { return _mm512_or_si512(a, b); }
  static OCSQ_INLINE V down(V a, int bits) { return _mm512_srli_epi16(a, bits); }
  static OCSQ_INLINE V up(V a, int bits) { return _mm512_slli_epi16(a, bits); }
  static OCSQ_INLINE V look_up(const uint8_t* table, V code) { return _mm512_shuffle_epi8(repeat(table), code); }
  static OCSQ_INLINE V look_up64(const uint8_t* table, V code) {
    const __mmask64 odd = _mm512_test_epi8_mask(code, all(16)), upper = _mm512_test_epi8_mask(code, all(32));
    const V low = _mm512_mask_blend_epi8(odd, look_up(table, code), look_up(table + 16, code));
    const V high = _mm512_mask_blend_epi8(odd, look_up(table + 32, code), look_up(table + 48, code));
    return _mm512_mask_blend_epi8(upper, low, high);
  }
};

struct Simd {
  static constexpr auto look_up = look_up_bytes;
  static constexpr int W = 16;
  using F = __m512;
  using I = __m512i;
  static OCSQ_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
  // The first `count` values, then those of `rest`; nothing behind them is read.
  static OCSQ_INLINE F load_first(const float* p, int count, F rest) {
    return _mm512_mask_loadu_ps(rest, static_cast<__mmask16>((1u << count) - 1), p);
  }
  static OCSQ_INLINE void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static OCSQ_INLINE F set1(float v) { return _mm512_set1_ps(v); }
  static OCSQ_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
  static OCSQ_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static OCSQ_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static OCSQ_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
  static OCSQ_INLINE F rint(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static OCSQ_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }
  static OCSQ_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
  static OCSQ_INLINE F select_beyond(F q, F limit, F a, F b) {
    const F size = _mm512_castsi512_ps(abs_bits(q));
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(size, limit, _CMP_GT_OQ), b, a);
  }
  static OCSQ_INLINE F select_at_most(F a, F b, F x, F y) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), y, x);
  }

  // Lanes l and l + 8, then + 4, + 2, + 1.
  static OCSQ_INLINE float reduce_halves(F v) {
    const __m256 top = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), top);
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
  }

  static OCSQ_INLINE I zero_i() { return _mm512_setzero_si512(); }
  static OCSQ_INLINE I set1_i(int32_t v) { return _mm512_set1_epi32(v); }
  static OCSQ_INLINE I load_i(const int32_t* p) { return _mm512_loadu_si512(p); }
  static OCSQ_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
  static OCSQ_INLINE I mul_i(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static OCSQ_INLINE I widen_bytes(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static OCSQ_INLINE I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
  static OCSQ_INLINE F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static OCSQ_INLINE I abs_bits(F v) { return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff)); }
  static OCSQ_INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
  static OCSQ_INLINE uint32_t nonzero(I v) { return _mm512_test_epi32_mask(v, v); }
  static OCSQ_INLINE uint32_t greater(I a, I b) { return _mm512_cmpgt_epi32_mask(a, b); }
  // The lanes that have a bit, first, then anything to a whole vector; returns their number.
  static OCSQ_INLINE int keep(I v, uint32_t which, int32_t* to) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(which), v));
    return __builtin_popcount(which);
  }
  static OCSQ_INLINE int32_t reduce_max(I v) { return _mm512_reduce_max_epi32(v); }
  static OCSQ_INLINE F power_of_two(F n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  static OCSQ_INLINE I round_to_int(F v) { return _mm512_cvtps_epi32(v); }
  // 32 codes in order, saturated to 16 bits.
  using Codes = __m512i;
  static OCSQ_INLINE Codes pack_codes(I a, I b) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);  // packs works per 128-bit quarter
    return _mm512_permutexvar_epi64(order, _mm512_packs_epi32(a, b));
  }
  static OCSQ_INLINE Codes set1_codes(int v) { return _mm512_set1_epi16(static_cast<int16_t>(v)); }
  static OCSQ_INLINE Codes sub_codes(Codes a, Codes b) { return _mm512_subs_epi16(a, b); }
  static OCSQ_INLINE Codes min_codes(Codes a, Codes b) { return _mm512_min_epi16(a, b); }
  static OCSQ_INLINE Codes max_codes(Codes a, Codes b) { return _mm512_max_epi16(a, b); }
  static OCSQ_INLINE bool all_greater(Codes a, Codes b) { return _mm512_cmpgt_epi16_mask(a, b) == ~0u; }
  // kCodeBits bits for every code beyond +-limit.
  static constexpr int kCodeBits = 1;
  static OCSQ_INLINE __mmask32 beyond(Codes codes, int limit) {
    return _mm512_cmpgt_epi16_mask(_mm512_abs_epi16(codes), _mm512_set1_epi16(static_cast<int16_t>(limit)));
  }
  static OCSQ_INLINE uint32_t bits(__mmask32 beyond) { return beyond; }
  static OCSQ_INLINE Codes count(Codes counts, __mmask32 beyond) {
    return _mm512_mask_add_epi16(counts, beyond, counts, _mm512_set1_epi16(1));
  }
  static OCSQ_INLINE int32_t reduce_codes(Codes codes) {
    return reduce_add(_mm512_dpwssd_epi32(zero_i(), codes, _mm512_set1_epi16(1)));
  }
  static OCSQ_INLINE int32_t reduce_add(I v) { return _mm512_reduce_add_epi32(v); }
  static OCSQ_INLINE void store_codes(int16_t* p, Codes codes) { _mm512_storeu_si512(p, codes); }
  static OCSQ_INLINE F load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static OCSQ_INLINE void store_bf16(uint16_t* p, F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    r = _mm512_srli_epi32(r, 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_blend_epi32(nan, r, _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
};

}  // namespace
}  // namespace ocsquant
