// A convolution as the linear layer of its patches: what lies where in its input.
#pragma once
#include <cmath>
#include <cstdint>

namespace ocsquant {

// Of one sample, channels innermost; a patch is [kernel_h][kernel_w][channels], zeros outside of the sample.
struct PatchShape {
  int64_t channels, height, width;
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int64_t out_h, out_w;
  int64_t pixels() const { return height * width; }
  int64_t values() const { return pixels() * channels; }
  int64_t rows() const { return out_h * out_w; }
  int64_t depth() const { return kernel_h * kernel_w * channels; }
  // Room for int16 codes of a sample, written in whole blocks of 64 from any pixel on.
  int64_t plane_codes() const { return (values() + 63) / 64 * 64 + 64; }
};

// Samples after they were quantized.
struct Planes {
  const uint8_t* first;
  int64_t bytes;      // of each
  const float* step;  // of each
};

// Pixels that are turned from channels first to channels last at a time.
constexpr int64_t kPlanePixels = 16;
// Codes of a sample stay below this, so that they fit int16.
constexpr int kMaxPlaneCode = 32512;

// What keeps the sums of a sample's patches within int32, whatever the weights.
struct PlaneBounds {
  // Times the root of the sample's sum of squares, the least step: by Cauchy and Schwarz the codes of a patch add up to
  // at most the root of their squares times that of the depth.
  float least_factor;
  int largest_code;  // where the step is fixed
};

// The last factor is for rounding: half a code for each.
inline PlaneBounds plane_bounds(int64_t depth, int64_t tail) {
  const double size = static_cast<double>(depth), weight = (tail > 0 ? 254.0 : 127.0) / 2147483648.0 * 1.02;
  const double code = 1.0 / (size * weight);
  return {static_cast<float>(std::sqrt(size) * weight), code < kMaxPlaneCode ? static_cast<int>(code) : kMaxPlaneCode};
}

// Pixels after whose channels blocks of 64 values begin anew.
inline int64_t pixel_period(int64_t channels) {
  int64_t period = 64;
  for (; period > 1 && channels % 2 == 0; channels /= 2) period /= 2;
  return period;
}

}  // namespace ocsquant
