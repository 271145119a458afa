// The 2^bits levels between two learned clips (methods: activation regularisation).
#pragma once
#include <algorithm>
#include <cmath>

namespace ocsquant {

// Level q is q * step + low, of x it is rint((clamp(x, low, high) - low) * inverse).
struct ClipGrid {
  float low, high;
  float step, inverse;
  float levels;  // 2^bits - 1
};

// Clips that meet or cross still give a grid: the upper one is moved up until there is a width. With `align_zero` the
// grid is moved by less than a step so that zero lies on it.
inline ClipGrid clip_grid(float low, float high, int bits, bool align_zero) {
  const float levels = static_cast<float>((1 << bits) - 1);
  const float least = std::max(1e-6f * std::max(std::fabs(low), std::fabs(high)), 1e-12f);
  if (high - low < least) high = low + least;
  const float width = high - low;
  const float step = width / levels, inverse = levels / width;
  if (align_zero) {
    low = std::nearbyint(low * inverse) * step;
    high = low + width;
  }
  return {low, high, step, inverse, levels};
}

}  // namespace ocsquant
