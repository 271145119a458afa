// A convolution as the linear layer of its patches: what lies where in its input.
#pragma once
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
  // Room for what quantize_plane() writes for a sample: whole blocks of 64, from any pixel on.
  int64_t plane_codes() const { return (values() + 63) / 64 * 64 + 64; }
};

// Pixels that are turned from channels first to channels last at a time.
constexpr int64_t kPlanePixels = 16;
// Codes of a sample stay within this much of each other's range, and the sum of a patch within int32 (quantize_plane).
constexpr float kMaxPlaneCode = 32512.0f;
constexpr int64_t kMaxPlaneProduct = int64_t{1} << 36;  // of values and depth, for samples with outliers

}  // namespace ocsquant
