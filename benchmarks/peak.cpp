// What the machine can do at best: int8 dot products out of registers, and reads of memory. Compiled by peak.py for the
// instruction set whose kernels run.
#include <immintrin.h>

#include <cstdint>

namespace {

constexpr int kSums = 12;  // as many as hide the latency of one

#if defined(__AVX512VNNI__)
using Vector = __m512i;
Vector start() { return _mm512_set1_epi8(1); }
void dot(Vector& sum, Vector a, Vector b) { sum = _mm512_dpbusd_epi32(sum, a, b); }
#else
using Vector = __m256i;
Vector start() { return _mm256_set1_epi8(1); }
#if defined(__AVXVNNI__)
void dot(Vector& sum, Vector a, Vector b) { sum = _mm256_dpbusd_avx_epi32(sum, a, b); }
#else
// Without an instruction for it: products of pairs, their sums in 16 bits; an upper bound, nothing is widened.
void dot(Vector& sum, Vector a, Vector b) {
  asm volatile("" : "+x"(a));  // else one product would do for all
  sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(a, b));
}
#endif
#endif

}  // namespace

extern "C" {

int64_t dot_operations() { return 2 * kSums * static_cast<int64_t>(sizeof(Vector)); }

// `rounds` of dot_operations() multiplications and additions.
void dot_products(int64_t rounds) {
  Vector sums[kSums], a = start(), b = start();
#pragma GCC unroll 12
  for (int s = 0; s < kSums; ++s) sums[s] = start();  // not unrolled, the compiler would keep them in memory
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int s = 0; s < kSums; ++s) {
      dot(sums[s], a, b);
      asm volatile("" : "+x"(sums[s]));
    }
  }
}

// `bytes`, a multiple of 512, from memory.
void read_bytes(const Vector* from, int64_t bytes) {
  Vector sums[8];
#pragma GCC unroll 8
  for (int s = 0; s < 8; ++s) sums[s] = start();
  for (const Vector* end = from + bytes / static_cast<int64_t>(sizeof(Vector)); from < end; from += 8) {
#pragma GCC unroll 8
    for (int s = 0; s < 8; ++s) {
      sums[s] ^= from[s];
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < 8; ++s) asm volatile("" : "+x"(sums[s]));
}
}
