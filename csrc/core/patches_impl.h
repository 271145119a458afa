// Convolution inputs: a sample is quantized once, with one step, and its patches are gathered as rows of codes.
// Included inside a target region, after rowwise_impl.h and linear_impl.h.
#pragma once

namespace ocsquant {
namespace {

// to[c][r] = from[r][c], rows of each `pitch` apart.
inline void transpose(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to,
                      int64_t to_pitch) {
  constexpr int64_t kTile = 16;
  for (int64_t r = 0; r < rows; r += kTile) {
    const int64_t height = rows - r < kTile ? rows - r : kTile;
    for (int64_t c = 0; c < columns; c += kTile) {
      const int64_t width = columns - c < kTile ? columns - c : kTile;
      float tile[kTile][kTile], turned[kTile][kTile];
      for (int64_t i = 0; i < height; ++i) {
        std::memcpy(tile[i], from + (r + i) * from_pitch + c, width * sizeof(float));
      }
      for (int64_t j = 0; j < kTile; ++j) {
        for (int64_t i = 0; i < kTile; ++i) turned[j][i] = tile[i][j];
      }
      for (int64_t j = 0; j < width; ++j) {
        std::memcpy(to + (c + j) * to_pitch + r, turned[j], height * sizeof(float));
      }
    }
  }
}

// Codes of a sample, channels last, by kPlanePixels pixels at a time where the values lie channels first.
template <bool kOutliers>
inline int64_t round_plane(const float* x, int64_t channels, int64_t pixels, bool channels_first, float step, int limit,
                           float* scratch, int16_t* codes) {
  CodesOut out{codes};
  if (!channels_first) return round_row<kOutliers>(x, channels * pixels, step, limit, out);
  int64_t beyond = 0;
  for (int64_t p = 0; p < pixels; p += kPlanePixels) {
    const int64_t count = pixels - p < kPlanePixels ? pixels - p : kPlanePixels;
    transpose(x + p, pixels, channels, count, scratch, channels);
    out.codes = codes + p * channels;
    beyond += round_row<kOutliers>(scratch, count * channels, step, limit, out);
  }
  return beyond;
}

// One sample to codes, as quantize_row() does it, but for the outliers: any up to how.max_outliers for each pixel keep
// codes beyond the range; if there are more, the step is that of the largest value. It is never less than least_factor
// (least_step_factor) times the root of the sum of squares, if there are any. Returns the step, NaN where the
// sample holds NaN or Inf.
inline float quantize_plane(const float* x, int64_t channels, int64_t pixels, bool channels_first,
                            const TokenQuantizer& how, float least_factor, float* scratch, int16_t* codes) {
  const int limit = (1 << (how.bits - 1)) - 1;
  const int64_t n = channels * pixels;
  const float range = static_cast<float>(limit);
  RowStatistics statistics;
  for_blocks(x, n, statistics);
  const float absmax = bits_to_float(Simd::reduce_max(statistics.largest));
  if (!(absmax <= std::numeric_limits<float>::max())) {
    std::memset(codes, 0, (n + kLanes - 1) / kLanes * kLanes * sizeof(int16_t));
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float whole = usable_step(absmax / range), squares = statistics.squares.total();
  const bool bounded = squares >= 0x1p-100f && squares <= std::numeric_limits<float>::max();
  const float bulk = how.threshold * std::sqrt(squares / static_cast<float>(n));
  if (how.max_outliers > 0 && bounded && bulk < absmax) {
    float step = usable_step(bulk / range);
    if (step < absmax / kMaxPlaneCode) step = absmax / kMaxPlaneCode;
    if (const float least = std::sqrt(squares) * least_factor; step < least) step = least;
    const int64_t beyond = round_plane<true>(x, channels, pixels, channels_first, step, limit, scratch, codes);
    if (beyond <= how.max_outliers * pixels) return step;
  }
  round_plane<false>(x, channels, pixels, channels_first, whole, limit, scratch, codes);
  return whole;
}

// The most codes beyond a byte that any pixel has.
inline int64_t largest_outliers(const int16_t* plane, int64_t channels, int64_t pixels) {
  int64_t most = 0;
  for (int64_t p = 0; p < pixels; ++p, plane += channels) {
    int32_t count = 0;
    for (int64_t c = 0; c < channels; ++c) count += plane[c] > 127 || plane[c] < -128;
    if (count > most) most = count;
  }
  return most;
}

// Rows of codes out of planes, the samples one after the other.
struct PatchRows {
  const int16_t* planes;
  const float* step;  // of each sample
  const PatchShape& s;
  int64_t first;

  struct Prepared {};
  Prepared prepare(int64_t) const { return {}; }

  template <class Out>
  OCSQ_INLINE float put(int64_t m, Prepared, Out& to) const {
    const int64_t row = first + m;
    int16_t* out = to.codes;
    const int64_t sample = row / s.rows(), pixel = row % s.rows();
    const int16_t* plane = planes + sample * s.plane_codes();
    const int64_t y0 = pixel / s.out_w * s.stride_h - s.padding_h, x0 = pixel % s.out_w * s.stride_w - s.padding_w;
    const int64_t right = x0 + (s.kernel_w - 1) * s.dilation_w;
    const bool whole = x0 >= 0 && right < s.width && s.dilation_w == 1;
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      const int64_t y = y0 + ky * s.dilation_h, width = s.kernel_w * s.channels;
      if (y < 0 || y >= s.height) {
        std::memset(out, 0, width * sizeof(int16_t));
      } else if (whole) {
        std::memcpy(out, plane + (y * s.width + x0) * s.channels, width * sizeof(int16_t));
      } else {
        for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
          const int64_t x = x0 + kx * s.dilation_w;
          int16_t* to = out + kx * s.channels;
          if (x < 0 || x >= s.width) {
            std::memset(to, 0, s.channels * sizeof(int16_t));
          } else {
            std::memcpy(to, plane + (y * s.width + x) * s.channels, s.channels * sizeof(int16_t));
          }
        }
      }
      out += width;
    }
    return step[sample];
  }
};

template <class Tile>
void place_patches(const int16_t* planes, const float* step, const PatchShape& shape, int64_t row,
                   const PackedWeight& w, const Activations& a, int64_t rows, void* scratch) {
  place_rows<Tile>(PatchRows{planes, step, shape, row}, w, a, 0, rows, static_cast<int16_t*>(scratch));
}

template <class Tile>
constexpr ConvolutionKernels convolution_kernels() {
  return {quantize_plane, transpose, largest_outliers, place_patches<Tile>};
}

}  // namespace
}  // namespace ocsquant
