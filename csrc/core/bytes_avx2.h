// Vectors of bytes for unpacking weights, by AVX2 alone. Included inside a target region.
#pragma once

namespace ocsquant {
namespace {

struct Bytes256 {
  using V = __m256i;
  static OCSQ_INLINE V load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static OCSQ_INLINE void store(uint8_t* p, V v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  // 16 bytes, again and again.
  static OCSQ_INLINE V repeat(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static OCSQ_INLINE V all(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  static OCSQ_INLINE V add(V a, V b) { return _mm256_add_epi8(a, b); }
  static OCSQ_INLINE V both(V a, V b) { return _mm256_and_si256(a, b); }
  static OCSQ_INLINE V either(V a, V b) { return _mm256_or_si256(a, b); }
  // Bits move into the neighbouring byte.
  static OCSQ_INLINE V down(V a, int bits) { return _mm256_srli_epi16(a, bits); }
  static OCSQ_INLINE V up(V a, int bits) { return _mm256_slli_epi16(a, bits); }
  // In a table of 16 bytes.
  static OCSQ_INLINE V look_up(const uint8_t* table, V code) { return _mm256_shuffle_epi8(repeat(table), code); }
  static OCSQ_INLINE V look_up64(const uint8_t* table, V code) {
    // The upper two bits of a code, moved to where a blend looks.
    const V odd = _mm256_slli_epi16(code, 3), upper = _mm256_slli_epi16(code, 2);
    const V low = _mm256_blendv_epi8(look_up(table, code), look_up(table + 16, code), odd);
    return _mm256_blendv_epi8(low, _mm256_blendv_epi8(look_up(table + 32, code), look_up(table + 48, code), odd),
                              upper);
  }
};

// Each of `count` codes (a multiple of 32) below 2^bits, 4 or 6 bits at most, becomes table[code].
inline void look_up_bytes(const uint8_t* table, int bits, int64_t count, uint8_t* codes) {
  for (int64_t i = 0; i < count; i += 32) {
    const __m256i code = Bytes256::load(codes + i);
    Bytes256::store(codes + i, bits > 4 ? Bytes256::look_up64(table, code) : Bytes256::look_up(table, code));
  }
}

}  // namespace
}  // namespace ocsquant
