// Quantize and dequantize in one pass, for training; gradients are straight-through. Included inside a target region,
// after rowwise_impl.h.
#pragma once

namespace ocsquant {
namespace {

struct SplitGrid {
  Simd::F scale, inverse;
  OCSQ_INLINE explicit SplitGrid(float s) : scale(Simd::set1(s)), inverse(Simd::set1(1.0f / s)) {}

  // min and max give their second operand when one is NaN, so NaN passes through.
  static OCSQ_INLINE Simd::F clamp(Simd::F q, Simd::F bound) {
    return Simd::max(Simd::sub(Simd::set1(0.0f), bound), Simd::min(bound, q));
  }
  OCSQ_INLINE void forward(const float* x, const float* limit, float* y) const {
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * Simd::W;
      const Simd::F q = Simd::rint(Simd::mul(Simd::load(x + at), inverse));
      Simd::store(y + at, Simd::mul(clamp(q, Simd::load(limit + at)), scale));
    }
  }
  OCSQ_INLINE void backward(const float* grad, const float* x, const float* limit, float* dx, LaneSum& sum) const {
    for (int v = 0; v < kVectors; ++v) {
      const int at = v * Simd::W;
      const Simd::F g = Simd::load(grad + at), bound = Simd::load(limit + at);
      const Simd::F u = Simd::mul(Simd::load(x + at), inverse), q = Simd::rint(u);
      Simd::store(dx + at, Simd::select_beyond(q, bound, Simd::set1(0.0f), g));
      const Simd::F slope = Simd::select_beyond(q, bound, clamp(q, bound), Simd::sub(q, u));
      sum.lane[v] = Simd::add(sum.lane[v], Simd::mul(g, slope));
    }
  }
};

inline void fake_quantize_split(const float* x, const float* limit, float scale, int64_t k, float* y) {
  const SplitGrid op(scale);
  int64_t j = 0;
  for (; j + kLanes <= k; j += kLanes) op.forward(x + j, limit + j, y + j);
  if (j < k) {
    float px[kLanes] = {}, pl[kLanes] = {}, py[kLanes];
    const size_t bytes = (k - j) * sizeof(float);
    std::memcpy(px, x + j, bytes);
    std::memcpy(pl, limit + j, bytes);
    op.forward(px, pl, py);
    std::memcpy(y + j, py, bytes);
  }
}

inline float fake_quantize_split_backward(const float* grad, const float* x, const float* limit, float scale, int64_t k,
                                          float* dx) {
  const SplitGrid op(scale);
  LaneSum sum;
  int64_t j = 0;
  for (; j + kLanes <= k; j += kLanes) op.backward(grad + j, x + j, limit + j, dx + j, sum);
  if (j < k) {
    float pg[kLanes] = {}, px[kLanes] = {}, pl[kLanes] = {}, pd[kLanes];
    const size_t bytes = (k - j) * sizeof(float);
    std::memcpy(pg, grad + j, bytes);
    std::memcpy(px, x + j, bytes);
    std::memcpy(pl, limit + j, bytes);
    op.backward(pg, px, pl, pd, sum);
    std::memcpy(dx + j, pd, bytes);
  }
  return sum.total();
}

struct ClipBlock {
  Simd::F low, high, inverse, step, levels;
  OCSQ_INLINE explicit ClipBlock(const ClipGrid& grid)
      : low(Simd::set1(grid.low)),
        high(Simd::set1(grid.high)),
        inverse(Simd::set1(grid.inverse)),
        step(Simd::set1(grid.step)),
        levels(Simd::set1(grid.levels)) {}

  OCSQ_INLINE Simd::F place(Simd::F x) const {
    return Simd::mul(Simd::sub(Simd::max(low, Simd::min(high, x)), low), inverse);
  }
  OCSQ_INLINE Simd::F level(Simd::F place) const { return Simd::min(levels, Simd::rint(place)); }
  OCSQ_INLINE void forward(const float* x, float* y) const {
    for (int v = 0; v < kVectors; ++v) {
      const Simd::F q = level(place(Simd::load(x + v * Simd::W)));
      Simd::store(y + v * Simd::W, Simd::add(Simd::mul(q, step), low));
    }
  }
};

struct ClipGradient {
  ClipBlock grid;
  LaneSum below, above, inside;
  OCSQ_INLINE explicit ClipGradient(const ClipGrid& g) : grid(g), below(), above(), inside() {}
  OCSQ_INLINE void operator()(const float* grad, const float* x, float* dx) {
    const Simd::F zero = Simd::set1(0.0f);
    for (int v = 0; v < kVectors; ++v) {
      const Simd::F g = Simd::load(grad + v * Simd::W), value = Simd::load(x + v * Simd::W);
      const Simd::F under = Simd::select_at_most(value, grid.low, g, zero);
      const Simd::F over = Simd::select_at_most(grid.high, value, g, zero);
      // A NaN is neither under nor over: its gradient passes, and the clips' become NaN.
      const Simd::F in = Simd::select_at_most(value, grid.low, zero, Simd::select_at_most(grid.high, value, zero, g));
      const Simd::F u = grid.place(value);
      below.lane[v] = Simd::add(below.lane[v], under);
      above.lane[v] = Simd::add(above.lane[v], over);
      inside.lane[v] = Simd::add(inside.lane[v], Simd::mul(in, Simd::sub(u, grid.level(u))));
      Simd::store(dx + v * Simd::W, in);
    }
  }
};

inline void fake_quantize_clip(const float* x, const ClipGrid& grid, int64_t n, float* y) {
  const ClipBlock op(grid);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) op.forward(x + j, y + j);
  if (j < n) {
    float px[kLanes] = {}, py[kLanes];
    const size_t bytes = (n - j) * sizeof(float);
    std::memcpy(px, x + j, bytes);
    op.forward(px, py);
    std::memcpy(y + j, py, bytes);
  }
}

inline ClipSums fake_quantize_clip_backward(const float* grad, const float* x, const ClipGrid& grid, int64_t n,
                                            float* dx) {
  ClipGradient op(grid);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) op(grad + j, x + j, dx + j);
  if (j < n) {
    float pg[kLanes] = {}, px[kLanes] = {}, pd[kLanes];
    const size_t bytes = (n - j) * sizeof(float);
    std::memcpy(pg, grad + j, bytes);
    std::memcpy(px, x + j, bytes);
    op(pg, px, pd);
    std::memcpy(dx + j, pd, bytes);
  }
  return {op.below.total(), op.above.total(), op.inside.total()};
}

}  // namespace
}  // namespace ocsquant
