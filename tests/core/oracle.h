// The definition of the numbers, written a second time and plainly: no vectors, no blocks, int64 sums. It shares
// nothing with csrc/core but the structures of kernels.h. Compile without contraction of multiply and add.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "core/kernels.h"

namespace coretest {

inline uint32_t bits_of(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

inline bool same(float a, float b) { return bits_of(a) == bits_of(b) || (std::isnan(a) && std::isnan(b)); }

inline float from_bf16(uint16_t v) { return float_of(static_cast<uint32_t>(v) << 16); }

// To nearest, ties to even; every NaN becomes one NaN.
inline uint16_t to_bf16(float v) {
  if (std::isnan(v)) return 0x7fc0;
  const uint32_t bits = bits_of(v), cut = bits & 0xffff, half = 0x8000;
  uint32_t top = bits >> 16;
  if (cut > half || (cut == half && top % 2 == 1)) ++top;
  return static_cast<uint16_t>(top);
}

inline int32_t round_half_even(float v) {
  const double d = v;
  int64_t t = static_cast<int64_t>(d);
  const double rest = d - static_cast<double>(t);
  const bool odd = t % 2 != 0;
  if (rest > 0.5 || (rest == 0.5 && odd)) ++t;
  if (rest < -0.5 || (rest == -0.5 && odd)) --t;
  return static_cast<int32_t>(t);
}

// Lane l adds the values at l, l + 64, ... in that order; then lanes l and l + 32, + 16, ... + 1.
class LaneTotal {
 public:
  void add(int64_t position, float v) { lane_[position % 64] = lane_[position % 64] + v; }
  float total() {
    for (int width = 32; width >= 1; width /= 2) {
      for (int l = 0; l < width; ++l) lane_[l] = lane_[l] + lane_[l + width];
    }
    return lane_[0];
  }

 private:
  float lane_[64] = {};
};

// codes[k] of one token; returns the step, NaN (and codes 0) for a token with NaN or Inf.
inline float quantize_token(const float* x, int64_t k, const ocsquant::TokenQuantizer& how, int32_t* codes) {
  const int limit = (1 << (how.bits - 1)) - 1;
  const auto usable = [](float step) { return step < std::ldexp(1.0f, -120) ? 0.0f : step; };
  // How many codes lie beyond the limit.
  const auto round_all = [&](float step) {
    const float inverse = step > 0.0f ? 1.0f / step : 0.0f;
    int64_t beyond = 0;
    for (int64_t j = 0; j < k; ++j) {
      codes[j] = round_half_even(x[j] * inverse);
      beyond += std::abs(codes[j]) > limit;
    }
    return beyond;
  };
  float absmax = 0.0f;
  for (int64_t j = 0; j < k; ++j) {
    if (!std::isfinite(x[j])) {
      std::fill_n(codes, k, 0);
      return std::numeric_limits<float>::quiet_NaN();
    }
    absmax = std::max(absmax, std::fabs(x[j]));
  }
  float step = usable(absmax / static_cast<float>(limit));
  if (how.max_outliers > 0) {
    LaneTotal sum;
    for (int64_t j = 0; j < k; ++j) sum.add(j, x[j] * x[j]);
    const float squares = sum.total();
    if (std::isfinite(squares) && squares >= std::ldexp(1.0f, -100)) {
      const float bulk = how.threshold * std::sqrt(squares / static_cast<float>(k));
      step = usable(std::min(absmax, bulk) / static_cast<float>(limit));
    }
    if (round_all(step) > how.max_outliers) {
      std::vector<float> sizes(k);
      for (int64_t j = 0; j < k; ++j) sizes[j] = std::fabs(x[j]);
      std::nth_element(sizes.begin(), sizes.begin() + how.max_outliers, sizes.end(), std::greater<float>());
      step = usable(sizes[how.max_outliers] / static_cast<float>(limit));
      round_all(step);
    }
    return step;
  }
  round_all(step);
  return step;
}

// The same with a fixed step of 1: how it treats values is all that is left of `how`.
inline float quantize_token_fixed(const float* x, int64_t k, const ocsquant::TokenQuantizer& how, int32_t* codes) {
  const int limit = (1 << (how.bits - 1)) - 1;
  int beyond = 0;
  for (int64_t j = 0; j < k; ++j) {
    if (!std::isfinite(x[j])) {
      std::fill_n(codes, k, 0);
      return std::numeric_limits<float>::quiet_NaN();
    }
    if (!how.symmetric) {
      codes[j] = round_half_even(std::max(0.0f, std::min(static_cast<float>(2 * limit + 1), x[j]))) - limit - 1;
      continue;
    }
    codes[j] = round_half_even(std::max(-32512.0f, std::min(32512.0f, x[j])));
    beyond += std::abs(codes[j]) > limit;
  }
  for (int64_t j = 0; j < k && beyond > how.max_outliers; ++j) codes[j] = std::max(-limit, std::min(limit, codes[j]));
  return 1.0f;
}

struct Weight {
  int64_t n = 0, k = 0, e = 0;
  std::vector<int8_t> codes, tail;  // [n][k], [n][e]
  std::vector<int32_t> index;       // [e]
  std::vector<float> scale, bias;   // [n], or [groups][n]; [n] or empty
  int64_t group = 0;                // channels that share a scale of an output; 0: all
  int bits = 8;                     // that a code is stored in
  std::vector<uint8_t> zero;        // [1 or groups][n] or empty
  std::vector<int8_t> levels;       // [64] or empty
  ocsquant::Nonlinearity nonlinearity = ocsquant::Nonlinearity::none;
};

// y[m][n] from codes[m][k] and what is added to it, [m][n] or empty. False if an exact sum does not fit the int32 the
// kernels keep it in.
inline bool linear(const std::vector<int32_t>& codes, const std::vector<float>& step, const Weight& w,
                   const std::vector<float>& residual, std::vector<float>& y) {
  const int64_t m = static_cast<int64_t>(step.size());
  bool fits = true;
  y.resize(m * w.n);
  for (int64_t i = 0; i < m; ++i) {
    const int32_t* q = codes.data() + i * w.k;
    for (int64_t j = 0; j < w.n; ++j) {
      const int8_t *c = w.codes.data() + j * w.k, *t = w.tail.data() + j * w.e;
      float v = 0.0f;
      const int64_t group = w.group > 0 ? w.group : std::max<int64_t>(w.k, 1);
      for (int64_t g = 0; g == 0 || g * group < w.k; ++g) {
        int64_t sum = 0;
        for (int64_t p = g * group; p < std::min(w.k, (g + 1) * group); ++p) sum += static_cast<int64_t>(q[p]) * c[p];
        for (int64_t p = 0; p < w.e; ++p) sum += static_cast<int64_t>(q[w.index[p]]) * t[p];
        fits = fits && sum == static_cast<int32_t>(sum);
        const float share = static_cast<float>(sum) * (step[i] * w.scale[g * w.n + j]);
        v = g == 0 ? share : v + share;
      }
      if (!w.bias.empty()) v = v + w.bias[j];
      if (!residual.empty()) v = v + residual[i * w.n + j];
      y[i * w.n + j] = v;
    }
  }
  // Its values are judged by nonlinearity_test.cpp.
  ocsquant::kScalar.nonlinear(w.nonlinearity, m * w.n, y.data());
  return fits;
}

inline float fake_quantize(float x, float limit, float scale) {
  const float q = std::nearbyint(x * (1.0f / scale));
  return (q > limit ? limit : q < -limit ? -limit : q) * scale;
}

// dx[k]; returns the gradient of the scale.
inline float fake_quantize_gradients(const float* grad, const float* x, const float* limit, float scale, int64_t k,
                                     float* dx) {
  LaneTotal sum;
  for (int64_t j = 0; j < k; ++j) {
    const float u = x[j] * (1.0f / scale), q = std::nearbyint(u);
    const bool clipped = q > limit[j] || q < -limit[j];
    dx[j] = clipped ? 0.0f : grad[j];
    sum.add(j, grad[j] * (!clipped ? q - u : q > 0.0f ? limit[j] : -limit[j]));
  }
  return sum.total();
}

// The nearest level of the grid.
inline float fake_quantize_clip(float x, const ocsquant::ClipGrid& grid) {
  if (std::isnan(x)) return x;
  const float inside = x < grid.low ? grid.low : x > grid.high ? grid.high : x;
  const float q = std::nearbyint((inside - grid.low) * grid.inverse);
  return (q > grid.levels ? grid.levels : q) * grid.step + grid.low;
}

inline ocsquant::ClipSums fake_quantize_clip_gradients(const float* grad, const float* x,
                                                       const ocsquant::ClipGrid& grid, int64_t n, float* dx) {
  LaneTotal below, above, inside;
  for (int64_t j = 0; j < n; ++j) {
    const bool under = x[j] <= grid.low, over = x[j] >= grid.high;
    const float value = under ? grid.low : over ? grid.high : x[j], u = (value - grid.low) * grid.inverse;
    const float q = std::nearbyint(u);
    dx[j] = under || over ? 0.0f : grad[j];
    below.add(j, under ? grad[j] : 0.0f);
    above.add(j, over ? grad[j] : 0.0f);
    inside.add(j, dx[j] * (u - (q > grid.levels ? grid.levels : q)));
  }
  return {below.total(), above.total(), inside.total()};
}

// out[d] = grad (null: 0) + factor * dK/dy where K > target; returns K.
inline float kurtosis_gradient(const float* grad, const float* y, int64_t d, float factor, float target, float* out) {
  const float count = static_cast<float>(d), nan = std::numeric_limits<float>::quiet_NaN();
  LaneTotal sum, squares, cubes, fourths;
  for (int64_t j = 0; j < d; ++j) sum.add(j, y[j]);
  const float mean = sum.total() / count;
  for (int64_t j = 0; j < d; ++j) squares.add(j, (y[j] - mean) * (y[j] - mean));
  const float variance = squares.total() / count, deviation = std::sqrt(variance);
  const bool finite = std::isfinite(variance);
  const bool flat = finite && (d == 1 || deviation <= 1e-5f * std::fabs(mean) || variance < std::ldexp(1.0f, -100));
  const float inverse = finite ? 1.0f / deviation : nan;
  for (int64_t j = 0; j < d; ++j) {
    const float w = (y[j] - mean) * inverse, w2 = w * w;
    cubes.add(j, w2 * w);
    fourths.add(j, w2 * w2);
  }
  const float skewness = finite ? cubes.total() / count : nan, k = flat ? 0.0f : finite ? fourths.total() / count : nan;
  const bool passes = flat || k <= target || factor == 0.0f;
  const float c = factor * 4.0f / count * inverse;
  for (int64_t j = 0; j < d; ++j) {
    const float w = (y[j] - mean) * inverse, slope = c * (w * (w * w - k) - skewness);
    out[j] = passes ? (grad == nullptr ? 0.0f : grad[j]) : grad == nullptr ? slope : grad[j] + slope;
  }
  return k;
}

}  // namespace coretest
