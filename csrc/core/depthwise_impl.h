// Convolutions of single channels, where products are too small for tiles: along the lines of a plane, tap by tap.
// Included inside a target region, after patches_impl.h.
#pragma once

#include "tile_int16.h"

namespace ocsquant {
namespace {

// Codes of a channel as they are, whatever the tiles want.
struct ChannelTile {
  using Plane = CodesPlane;
};

constexpr int64_t kSumsAtOnce = 2048;  // that stay in the first cache

// A plane with its padding, then sums.
inline int64_t padded_codes(const PatchShape& s) {
  return ((s.height + 2 * s.padding_h) * (s.width + 2 * s.padding_w) + 63) / 64 * 64;
}
inline int64_t channel_scratch_bytes(const PatchShape& s) {
  const int64_t sums = s.out_w > kSumsAtOnce ? s.out_w : kSumsAtOnce;
  return padded_codes(s) * static_cast<int64_t>(sizeof(int16_t)) + sums * static_cast<int64_t>(sizeof(int32_t));
}

// sums[i] += a * x[i * stride] + b * y[i * stride]
inline void add_taps(int32_t a, const int16_t* x, int32_t b, const int16_t* y, int64_t stride, int64_t count,
                     int32_t* sums) {
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) sums[i] += a * x[i] + b * y[i];
  } else {
    for (int64_t i = 0; i < count; ++i) sums[i] += a * x[i * stride] + b * y[i * stride];
  }
}

// One output of a channel, [out_h][out_w], from its codes. Where nothing is strided several lines go as one, with what
// lies between them.
inline void convolve_channel(const uint8_t* plane, const PatchShape& s, const int32_t* taps, float factor,
                             const float* bias, void* scratch, float* y) {
  const int16_t* codes = reinterpret_cast<const int16_t*>(plane);
  const int64_t pitch = s.width + 2 * s.padding_w, count = s.kernel_h * s.kernel_w;
  int16_t* padded = static_cast<int16_t*>(scratch);
  int32_t* sums = reinterpret_cast<int32_t*>(padded + padded_codes(s));
  if (s.padding_h + s.padding_w > 0) {
    std::memset(padded, 0, padded_codes(s) * sizeof(int16_t));
    for (int64_t i = 0; i < s.height; ++i) {
      std::memcpy(padded + (i + s.padding_h) * pitch + s.padding_w, codes + i * s.width, s.width * sizeof(int16_t));
    }
    codes = padded;
  }
  const bool dense = s.stride_h == 1 && s.stride_w == 1 && pitch <= kSumsAtOnce;
  const int64_t most = dense ? kSumsAtOnce / pitch : 1;
  const auto place = [&](int64_t tap) {
    return tap / s.kernel_w * s.dilation_h * pitch + tap % s.kernel_w * s.dilation_w;
  };
  for (int64_t first = 0; first < s.out_h; first += most) {
    const int64_t lines = s.out_h - first < most ? s.out_h - first : most, width = (lines - 1) * pitch + s.out_w;
    const int16_t* from = codes + first * s.stride_h * pitch;
    std::memset(sums, 0, width * sizeof(int32_t));
    for (int64_t t = 0; t < count; t += 2) {
      const int64_t next = t + 1 < count ? t + 1 : t;
      add_taps(taps[t], from + place(t), next > t ? taps[next] : 0, from + place(next), s.stride_w, width, sums);
    }
    for (int64_t i = 0; i < lines; ++i, y += s.out_w) {
      const int32_t* line = sums + i * pitch;
      for (int64_t x = 0; x < s.out_w; ++x) y[x] = static_cast<float>(line[x]) * factor;
      for (int64_t x = 0; x < s.out_w && bias != nullptr; ++x) y[x] += *bias;
    }
  }
}

template <class Tile>
constexpr ConvolutionKernels convolution_kernels() {
  using Plane = typename Tile::Plane;
  return {Plane::bytes,
          quantize_plane<Tile>,
          transpose,
          Plane::largest_outliers,
          place_patches<Tile>,
          ChannelTile::Plane::bytes,
          quantize_plane<ChannelTile>,
          channel_scratch_bytes,
          convolve_channel};
}

}  // namespace
}  // namespace ocsquant
