// Vectors of bytes for unpacking weights, by AVX2 alone. Included inside a target region.
#pragma once

namespace ocsquant {
namespace {

struct Bytes256 {
  using V = __m256i;
  static OCSQ_INLINE V load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static OCSQ_INLINE V all(int byte) { return _mm256_set1_epi8(static_cast<char>(byte)); }
  static OCSQ_INLINE V add(V a, V b) { return _mm256_add_epi8(a, b); }
  static OCSQ_INLINE V both(V a, V b) { return _mm256_and_si256(a, b); }
  static OCSQ_INLINE V either(V a, V b) { return _mm256_or_si256(a, b); }
  // Bits move into the neighbouring byte.
  static OCSQ_INLINE V down(V a, int bits) { return _mm256_srli_epi16(a, bits); }
  static OCSQ_INLINE V up(V a, int bits) { return _mm256_slli_epi16(a, bits); }
  // In a table of 16 bytes.
  static OCSQ_INLINE V look_up(const uint8_t* table, V code) {
    const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(entries), code);
  }
};

// Each of `count` codes (a multiple of 32) below 2^bits, 4 or 6 bits at most, becomes table[code].
inline void look_up_bytes(const uint8_t* bytes, int bits, int64_t count, uint8_t* codes) {
  __m256i table[4];
  for (int t = 0; t < 4; ++t) {
    const __m128i part = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * t));
    table[t] = _mm256_broadcastsi128_si256(part);
  }
  for (int64_t i = 0; i < count; i += 32) {
    __m256i* at = reinterpret_cast<__m256i*>(codes + i);
    const __m256i code = _mm256_loadu_si256(at);
    __m256i level = _mm256_shuffle_epi8(table[0], code);
    if (bits > 4) {
      // The upper two bits of a code, moved to where a blend looks.
      const __m256i odd = _mm256_slli_epi16(code, 3), upper = _mm256_slli_epi16(code, 2);
      level = _mm256_blendv_epi8(level, _mm256_shuffle_epi8(table[1], code), odd);
      const __m256i third = _mm256_shuffle_epi8(table[2], code), fourth = _mm256_shuffle_epi8(table[3], code);
      level = _mm256_blendv_epi8(level, _mm256_blendv_epi8(third, fourth, odd), upper);
    }
    _mm256_storeu_si256(at, level);
  }
}

}  // namespace
}  // namespace ocsquant
