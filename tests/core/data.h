// Operands of the tests: every kind of token and weight that once broke somebody's kernel, from a seed.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "oracle.h"

namespace coretest {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>((next() >> 33) % static_cast<uint64_t>(n)); }
  float uniform() { return static_cast<float>(next() >> 40) * 0x1p-24f; }
  float sign() { return next() % 2 == 0 ? 1.0f : -1.0f; }
  // Four uniforms: near enough to a Gaussian of deviation 1, and cheap.
  float gauss() {
    const uint64_t r = next();
    const int64_t sum = static_cast<int64_t>((r & 0xffff) + ((r >> 16) & 0xffff) + ((r >> 32) & 0xffff) + (r >> 48));
    return static_cast<float>(sum - 131070) * (1.0f / 37837.0f);
  }

 private:
  uint64_t state_;
};

inline uint64_t mix(uint64_t a, uint64_t b, uint64_t c) { return Random(a * 1000003 + b * 10007 + c).next(); }

enum Fill {
  kGaussian,   // no outlier
  kOutliers,   // a few values of 8..200 deviations
  kConstant,   // one value everywhere, +-limit as code: with weights of one sign, vpmaddubsw would saturate
  kZero,       //
  kHuge,       // one value, the rest nearly nothing
  kTiny,       // denormals, steps around 2^-120, squares around 2^-100
  kCrowd,      // more outliers than the list may hold, many of one size
  kTies,       // codes at n + .5 exactly
  kNonFinite,  // NaN or Inf somewhere
  kFloatMax,   // squares, or the products of the epilogue, overflow
  kEdge,       // codes just around +-127, where body and rest part
  kHalf,       // codes of +-60 to +-67, alike but for one value: pairs and 16-bit sums at their limits
  kFills
};

inline void fill_token(Random& r, int fill, const ocsquant::TokenQuantizer& how, int64_t k, float* x) {
  const float size = std::ldexp(1.0f + r.uniform(), static_cast<int>(r.below(20)) - 10);
  const float limit = static_cast<float>((1 << (how.bits - 1)) - 1);
  for (int64_t j = 0; j < k; ++j) x[j] = size * r.gauss();
  if (k == 0) return;
  const auto somewhere = [&]() -> float& { return x[r.below(k)]; };
  switch (fill) {
    case kOutliers:
      for (int64_t i = 1 + r.below(20); i > 0; --i) somewhere() = size * r.sign() * (8.0f + 192.0f * r.uniform());
      break;
    case kConstant: {
      const float v = size * r.sign();
      for (int64_t j = 0; j < k; ++j) x[j] = v;
      break;
    }
    case kZero:
      for (int64_t j = 0; j < k; ++j) x[j] = r.next() % 2 == 0 ? 0.0f : -0.0f;
      break;
    case kHuge:
      for (int64_t j = 0; j < k; ++j) x[j] *= 1e-6f;
      somewhere() = size * r.sign() * 1e6f;
      break;
    case kTiny: {
      const int64_t kind = r.below(4);
      const float near = 0.8f + 0.4f * r.uniform();
      if (kind == 0) {  // a step about 2^-120
        const float top = near * std::ldexp(limit, -120);
        for (int64_t j = 0; j < k; ++j) x[j] = top * (2.0f * r.uniform() - 1.0f);
        somewhere() = r.sign() * top;
      } else if (kind == 1) {  // squares about 2^-100, with an outlier
        const float one = near * std::ldexp(1.0f, -50) / std::sqrt(static_cast<float>(k) + 63.0f);
        for (int64_t j = 0; j < k; ++j) x[j] = r.sign() * one;
        somewhere() = r.sign() * one * 8.0f;
      } else {
        const float unit = std::ldexp(1.0f, kind == 2 ? -149 : -128);
        for (int64_t j = 0; j < k; ++j) x[j] = unit * 4.0f * r.gauss();
      }
      break;
    }
    case kCrowd: {
      const float one = size * 50.0f;
      for (int64_t i = k / 8 + 1; i > 0; --i) somewhere() = r.sign() * (i % 2 == 0 ? one : one * (1.0f + r.uniform()));
      break;
    }
    case kTies: {
      const float unit = std::ldexp(1.0f, static_cast<int>(r.below(12)) - 6);
      const int64_t range = static_cast<int64_t>(limit);
      for (int64_t j = 0; j < k; ++j) x[j] = unit * r.sign() * (static_cast<float>(r.below(range)) + 0.5f);
      somewhere() = unit * r.sign() * limit;
      break;
    }
    case kNonFinite: {
      const uint32_t kinds[] = {0x7fc00000, 0xffc00001, 0x7f800001, 0x7f800000, 0xff800000};
      somewhere() = float_of(kinds[r.below(5)]);
      break;
    }
    case kFloatMax: {
      const float top = r.next() % 2 == 0 ? std::numeric_limits<float>::max() : 1.8e19f;
      for (int64_t i = 1 + r.below(4); i > 0; --i) somewhere() = r.sign() * top;
      break;
    }
    case kEdge: {
      for (int64_t j = 0; j < k; ++j) x[j] = size * r.sign();
      // Sitting at the threshold, so the codes fall at limit - 2 .. limit + 3.
      const float bulk = how.threshold * size;
      for (int64_t i = 1 + r.below(3); i > 0; --i) {
        somewhere() = bulk * r.sign() *
                      (1.0f + (5.0f * r.uniform() - 1.5f) / limit + 0.5f * how.threshold / static_cast<float>(k));
      }
      break;
    }
    case kHalf: {
      const float part = static_cast<float>(60 + r.below(8)) / 127.0f;
      for (int64_t j = 0; j < k; ++j) x[j] = size * part;
      if (r.next() % 2 == 0) {
        for (int64_t j = 0; j < k; ++j) x[j] *= r.sign();
      }
      somewhere() = size * r.sign();
      break;
    }
    default:
      break;
  }
}

struct Tokens {
  int64_t m = 0, k = 0;
  ocsquant::Float dtype = ocsquant::Float::f32;
  ocsquant::TokenQuantizer how = {};
  int fill = 0;  // kFills: another one in every row
  std::vector<float> x;
  std::vector<uint16_t> x16;   // the same values, where dtype is bf16
  std::vector<float> inverse;  // [k], or empty: not folded
  std::vector<float> shift;    // [k], or empty
  std::vector<float> step;     // what the definition makes of them
  std::vector<int32_t> codes;  // [m][k]
};

inline void quantize_tokens(Tokens& t) {
  t.step.resize(t.m);
  t.codes.resize(t.m * t.k);
  std::vector<float> u(t.k);
  for (int64_t i = 0; i < t.m; ++i) {
    const float* x = t.x.data() + i * t.k;
    for (int64_t j = 0; j < t.k; ++j) {
      const float centred = t.shift.empty() ? x[j] : x[j] - t.shift[j];
      u[j] = t.inverse.empty() ? x[j] : centred * t.inverse[j];
    }
    const auto quantizer = t.how.fixed ? quantize_token_fixed : quantize_token;
    t.step[i] = quantizer(u.data(), t.k, t.how, t.codes.data() + i * t.k);
  }
}

// What scale_folded_linear adds: every third case has it, half of those with a fixed step and with a shift.
inline void fold_inputs(Random& r, Tokens& t) {
  t.inverse.clear();
  t.shift.clear();
  t.how.fixed = false;
  t.how.symmetric = true;
  if (r.below(3) != 0 || t.k > ocsquant::kMaxFixedDepth / 2) return;
  t.how.fixed = r.next() % 2 == 0;
  t.how.symmetric = !t.how.fixed || r.next() % 2 == 0;
  float largest = 1e-30f;
  for (const float v : t.x) largest = std::isfinite(v) ? std::max(largest, std::fabs(v)) : largest;
  const float limit = static_cast<float>((1 << (t.how.bits - 1)) - 1);
  t.inverse.resize(t.k);
  for (auto& v : t.inverse) v = (0.5f + r.uniform()) * (t.how.fixed ? limit / largest : 1.0f);
  // A channel that leaves the range, 16 bits, 32 bits.
  static constexpr float kBeyond[] = {50.0f, 50.0f, 258.0f, 500.0f, 1.6e7f, 5e7f, 1e30f};
  if (r.next() % 4 == 0) t.inverse[r.below(t.k)] *= kBeyond[r.below(7)];
  if (r.next() % 2 == 0) {
    t.shift.resize(t.k);
    for (auto& v : t.shift) v = largest * 0.1f * r.gauss();
  }
}

// fill: one of Fill, or -1 to let the seed choose.
inline void make_tokens(int64_t m, int64_t k, uint64_t seed, int fill, Tokens& t) {
  static constexpr int kBits[] = {8, 8, 6, 4, 2}, kOutlierCounts[] = {16, 1, 0, 64};
  static constexpr float kThresholds[] = {4.0f, 2.0f, 6.0f};
  Random r(seed);
  t.m = m;
  t.k = k;
  t.dtype = r.next() % 3 == 0 ? ocsquant::Float::bf16 : ocsquant::Float::f32;
  t.how = {kBits[r.below(5)], kOutlierCounts[r.below(4)], kThresholds[r.below(3)]};
  const int64_t choice = r.below(2 * kFills);
  t.fill = fill >= 0 ? fill : choice < kFills ? static_cast<int>(choice) : static_cast<int>(kFills);
  t.x.resize(m * k);
  for (int64_t i = 0; i < m; ++i) {
    fill_token(r, t.fill == kFills ? static_cast<int>(r.below(kFills)) : t.fill, t.how, k, t.x.data() + i * k);
  }
  t.x16.resize(m * k);
  if (t.dtype == ocsquant::Float::bf16) {
    for (size_t j = 0; j < t.x.size(); ++j) {
      t.x16[j] = static_cast<uint16_t>(bits_of(t.x[j]) >> 16);
      t.x[j] = from_bf16(t.x16[j]);
    }
  }
  fold_inputs(r, t);
  quantize_tokens(t);
}

enum WeightFill {
  kFull,
  kAllTop,
  kAllBottom,
  kExtremes,
  kZeros,
  kFourBit,
  kWithMinus128,
  kBell,
  kHalfTop,
  kWeightFills
};

inline void fill_codes(Random& r, int fill, std::vector<int8_t>& codes) {
  const int half = 60 + static_cast<int>(r.below(9));
  for (auto& c : codes) {
    const uint64_t v = r.next() >> 40;
    switch (fill) {
      case kAllTop:
        c = 127;
        break;
      case kAllBottom:
        c = -127;
        break;
      case kExtremes:
        c = v % 2 == 0 ? 127 : -127;
        break;
      case kZeros:
        c = 0;
        break;
      case kFourBit:
        c = static_cast<int8_t>(static_cast<int>(v % 15) - 7);
        break;
      case kWithMinus128:
        c = static_cast<int8_t>(v);
        break;
      case kBell:  // as trained weights are
        c = static_cast<int8_t>(std::max(-127.0f, std::min(127.0f, 32.0f * r.gauss())));
        break;
      case kHalfTop:  // with kHalf, 16-bit sums at their limit
        c = static_cast<int8_t>(half);
        break;
      default:
        c = static_cast<int8_t>(static_cast<int>(v % 255) - 127);
    }
  }
}

// Codes as `bits` bits can express them, from what has been filled in: around 2^(bits-1), around zero points, or a
// table.
inline void narrow_codes(Random& r, Weight& w) {
  const int top = 1 << w.bits;
  const uint64_t kind = r.below(4);
  const int64_t size = w.group > 0 ? w.group : std::max<int64_t>(w.k, 1), groups = (w.k + size - 1) / size;
  w.zero.resize(kind == 1 ? std::max<int64_t>(groups, 1) * w.n : 0);
  w.levels.resize(kind == 2 ? 64 : 0);
  for (auto& z : w.zero) z = static_cast<uint8_t>(r.below(4) == 0 ? (r.below(2) == 0 ? 0 : top - 1) : r.below(top));
  for (auto& level : w.levels) level = static_cast<int8_t>(r.next() >> 40);
  for (int64_t j = 0; j < w.n; ++j) {
    for (int64_t p = 0; p < w.k; ++p) {
      int8_t& code = w.codes[j * w.k + p];
      const int number = (code + 128) >> (8 - w.bits);
      const int zero = w.zero.empty() ? top / 2 : w.zero[p / size * w.n + j];
      code = static_cast<int8_t>(w.levels.empty() ? number - zero : w.levels[number]);
    }
  }
}

// fill: one of WeightFill, or -1 to let the seed choose; e tail columns, at most k.
constexpr int kNonlinearities = static_cast<int>(ocsquant::Nonlinearity::tanh) + 1;

inline void make_weight(int64_t n, int64_t k, int64_t e, uint64_t seed, int fill, Weight& w) {
  Random r(seed);
  w.n = n;
  w.k = k;
  w.e = e;
  const bool has_bias = r.next() % 2 == 0, wild = r.next() % 8 == 0;
  const int chosen = static_cast<int>(r.below(2 * kWeightFills));
  fill = fill >= 0 ? fill : chosen < kWeightFills ? chosen : static_cast<int>(kFull);
  w.codes.resize(n * k);
  w.tail.resize(n * e);
  fill_codes(r, fill, w.codes);
  fill_codes(r, fill, w.tail);
  w.index.clear();
  for (int64_t j = 0; j < k; ++j) {
    const int64_t need = e - static_cast<int64_t>(w.index.size());
    if (need > 0 && r.below(k - j) < need) w.index.push_back(static_cast<int32_t>(j));
  }
  static constexpr int64_t kGroupSizes[] = {16, 32, 64, 128, 400, 1040};
  w.group = e == 0 && k > 0 && r.below(3) == 0 ? kGroupSizes[r.below(6)] : 0;
  static constexpr int kWidths[] = {8, 8, 8, 6, 4, 2};
  w.bits = kWidths[r.below(6)];
  w.zero.clear();
  w.levels.clear();
  if (w.bits < 8) narrow_codes(r, w);
  w.scale.resize(n * (w.group > 0 ? (k + w.group - 1) / w.group : 1));
  w.bias.resize(has_bias ? n : 0);
  for (auto& s : w.scale) s = std::ldexp(0.5f + r.uniform(), wild ? static_cast<int>(r.below(250)) - 125 : -9);
  for (auto& b : w.bias) b = r.gauss() * 3.0f;
  const bool plain = r.below(3) != 0;
  w.nonlinearity = plain ? ocsquant::Nonlinearity::none : static_cast<ocsquant::Nonlinearity>(r.below(kNonlinearities));
}

}  // namespace coretest
