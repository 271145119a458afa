// The vector type of the algorithms in *_impl.h, one lane wide: the oracle of the fast ones, and what runs where no
// instruction set below applies.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>

namespace ocsquant {
namespace {

struct Simd {
  static constexpr int W = 1;
  using F = float;
  using I = int32_t;
  static F load(const float* p) { return *p; }
  // The first `count` values, then those of `rest`; nothing behind them is read.
  static F load_first(const float* p, int count, F rest) { return count > 0 ? *p : rest; }
  static void store(float* p, F v) { *p = v; }
  static F set1(float v) { return v; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F rint(F v) { return std::nearbyint(v); }
  // The second operand where either is NaN, as the x86 instructions do: clamp(NaN) stays NaN with the value second.
  static F min(F a, F b) { return a < b ? a : b; }
  static F max(F a, F b) { return a > b ? a : b; }
  // a where |q| > limit, else b; a NaN q selects b.
  static F select_beyond(F q, F limit, F a, F b) { return std::fabs(q) > limit ? a : b; }
  // x where a <= b, else y, also where one of them is NaN.
  static F select_at_most(F a, F b, F x, F y) { return a <= b ? x : y; }

  static float reduce_halves(F v) { return v; }

  static I zero_i() { return 0; }
  static I set1_i(int32_t v) { return v; }
  static I load_i(const int32_t* p) { return *p; }
  // Modulo 2^32, as the vector types have it.
  static I sub_i(I a, I b) { return static_cast<I>(static_cast<uint32_t>(a) - static_cast<uint32_t>(b)); }
  static F to_float(I v) { return static_cast<float>(v); }
  static I abs_bits(F v) {
    int32_t bits;
    std::memcpy(&bits, &v, 4);
    return bits & 0x7fffffff;
  }
  static I max_i(I a, I b) { return a > b ? a : b; }
  static int32_t reduce_max(I v) { return v; }
  // A bit for every lane.
  static uint32_t greater(I a, I b) { return a > b; }
  static int keep(I v, uint32_t which, int32_t* to) {
    *to = v;
    return static_cast<int>(which);
  }
  // 2^n of a whole n within -126..127; of NaN anything.
  static F power_of_two(F n) { return n == n ? std::ldexp(1.0f, static_cast<int>(n)) : 1.0f; }
  // The least integer where the value has none, as the x86 instructions do.
  static I round_to_int(F v) {
    return v >= -0x1p31f && v < 0x1p31f ? static_cast<int32_t>(std::nearbyint(v)) : std::numeric_limits<I>::min();
  }
  // Two codes, saturated to 16 bits.
  struct Codes {
    int16_t a, b;
  };
  static Codes pack_codes(I a, I b) { return {saturated(a), saturated(b)}; }
  static Codes set1_codes(int v) { return pack_codes(v, v); }
  static Codes sub_codes(Codes x, Codes y) { return pack_codes(x.a - y.a, x.b - y.b); }
  static Codes min_codes(Codes x, Codes y) { return {x.a < y.a ? x.a : y.a, x.b < y.b ? x.b : y.b}; }
  static Codes max_codes(Codes x, Codes y) { return {x.a > y.a ? x.a : y.a, x.b > y.b ? x.b : y.b}; }
  static bool all_greater(Codes x, Codes y) { return x.a > y.a && x.b > y.b; }
  // kCodeBits bits for every code beyond +-limit.
  static constexpr int kCodeBits = 1;
  static Codes beyond(Codes codes, int limit) {
    return {static_cast<int16_t>(std::abs(codes.a) > limit), static_cast<int16_t>(std::abs(codes.b) > limit)};
  }
  static uint32_t bits(Codes beyond) { return static_cast<uint32_t>(beyond.a | beyond.b << 1); }
  static Codes count(Codes counts, Codes beyond) { return pack_codes(counts.a + beyond.a, counts.b + beyond.b); }
  static int32_t reduce_codes(Codes codes) { return codes.a + codes.b; }
  static void look_up(const uint8_t* table, int, int64_t count, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i) codes[i] = table[codes[i]];
  }
  static void store_codes(int16_t* p, Codes codes) { p[0] = codes.a, p[1] = codes.b; }
  static F load_bf16(const uint16_t* p) {
    const uint32_t bits = static_cast<uint32_t>(*p) << 16;
    float v;
    std::memcpy(&v, &bits, 4);
    return v;
  }
  static void store_bf16(uint16_t* p, F v) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    *p = v != v ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }

 private:
  static int16_t saturated(I v) { return static_cast<int16_t>(v < -0x8000 ? -0x8000 : v > 0x7fff ? 0x7fff : v); }
};

}  // namespace
}  // namespace ocsquant
