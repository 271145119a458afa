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
template <bool kOutliers, class Out>
OCSQ_INLINE int64_t round_plane(const float* x, const PatchShape& s, bool channels_first, float step, int limit,
                                float* scratch, Out& out) {
  if (!channels_first) return round_row<kOutliers>(x, s.values(), step, limit, out);
  int64_t beyond = 0;
  for (int64_t p = 0; p < s.pixels(); p += kPlanePixels) {
    const int64_t count = s.pixels() - p < kPlanePixels ? s.pixels() - p : kPlanePixels;
    transpose(x + p, s.pixels(), s.channels, count, scratch, s.channels);
    out.start(p * s.channels);
    beyond += round_row<kOutliers>(scratch, count * s.channels, step, limit, out);
  }
  return beyond;
}

// Codes of step 1 of a sample's scaled values up to +-most; how many lie beyond +-limit, or -1 where they are not those
// of the values. how.inverse and how.shift hold a period of pixels.
template <bool kOutliers, bool kAnySize, class Out>
OCSQ_INLINE int64_t round_plane_fixed(const float* x, const PatchShape& s, bool channels_first,
                                      const TokenQuantizer& how, int limit, int most, float* scratch, Out& out) {
  RowFixedCodes<kOutliers, kAnySize, Out> codes(out, how, limit, most);
  const int64_t period = pixel_period(s.channels);
  const int64_t piece = channels_first && period > kPlanePixels ? kPlanePixels : period;
  TokenQuantizer own = how;
  for (int64_t p = 0; p < s.pixels(); p += piece) {
    const int64_t left = s.pixels() - p, count = left < piece ? left : piece;
    const float* from = x + p * s.channels;
    if (channels_first) {
      const int64_t at = p % kPlanePixels;
      if (at == 0) {
        transpose(x + p, s.pixels(), s.channels, left < kPlanePixels ? left : kPlanePixels, scratch, s.channels);
      }
      from = scratch + at * s.channels;
    }
    codes.inverse = own.inverse = how.inverse + p % period * s.channels;
    if (how.shift != nullptr) codes.shift = own.shift = how.shift + p % period * s.channels;
    codes.out.start(p * s.channels);
    codes.row(from, count * s.channels, own);
  }
  out = codes.out;
  return codes.valid() ? codes.outliers.total() : -1;
}

// Whether the sample has codes of step 1; more than how.max_outliers for each pixel beyond the range: all are clamped.
template <bool kAnySize, class Out>
OCSQ_INLINE bool put_plane_fixed(const float* x, const PatchShape& s, bool channels_first, const TokenQuantizer& how,
                                 const PlaneBounds& bounds, float* scratch, Out& out) {
  const int limit = (1 << (how.bits - 1)) - 1;
  if (how.max_outliers > 0) {
    const int most = bounds.largest_code > limit ? bounds.largest_code : limit;
    Out split = out;
    const int64_t beyond = round_plane_fixed<true, kAnySize>(x, s, channels_first, how, limit, most, scratch, split);
    if (beyond < 0) return false;
    if (beyond <= how.max_outliers * s.pixels()) {
      out = split;
      return true;
    }
  }
  return round_plane_fixed<false, kAnySize>(x, s, channels_first, how, limit, limit, scratch, out) >= 0;
}

template <class Out>
OCSQ_INLINE float quantize_plane_fixed(const float* x, const PatchShape& s, bool channels_first,
                                       const TokenQuantizer& how, const PlaneBounds& bounds, float* scratch, Out& out) {
  Out small = out, any = out;
  if (put_plane_fixed<false>(x, s, channels_first, how, bounds, scratch, small)) {
    small.finish();
    return 1.0f;
  }
  if (put_plane_fixed<true>(x, s, channels_first, how, bounds, scratch, any)) {
    any.finish();
    return 1.0f;
  }
  out.zeros(s.values());
  out.finish();
  return std::numeric_limits<float>::quiet_NaN();
}

// One sample to codes, as quantize_row() does it, but for the outliers: any up to how.max_outliers for each pixel keep
// codes beyond the range; if there are more, the step is that of the largest value. It is never less than
// bounds.least_factor times the root of the sum of squares, if there are any. Returns the step, NaN where the sample
// holds NaN or Inf.
template <class Tile>
float quantize_plane(const float* x, const PatchShape& s, bool channels_first, const TokenQuantizer& how,
                     const PlaneBounds& bounds, float* scratch, uint8_t* plane) {
  if (how.fixed) {
    typename Tile::Plane::Out fixed(s, plane, how.max_outliers);
    return quantize_plane_fixed(x, s, channels_first, how, bounds, scratch, fixed);
  }
  const int limit = (1 << (how.bits - 1)) - 1;
  const int64_t n = s.values();
  const float range = static_cast<float>(limit);
  RowStatistics statistics;
  for_blocks(x, n, statistics);
  const float absmax = bits_to_float(Simd::reduce_max(statistics.largest));
  typename Tile::Plane::Out out(s, plane, how.max_outliers);
  if (!(absmax <= std::numeric_limits<float>::max())) {
    out.zeros(n);
    out.finish();
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float squares = statistics.squares.total();
  const bool bounded = squares >= 0x1p-100f && squares <= std::numeric_limits<float>::max();
  const float bulk = how.threshold * std::sqrt(squares / static_cast<float>(n));
  if (how.max_outliers > 0 && bounded && bulk < absmax) {
    float step = usable_step(bulk / range);
    if (step < absmax / static_cast<float>(kMaxPlaneCode)) step = absmax / static_cast<float>(kMaxPlaneCode);
    if (const float least = std::sqrt(squares) * bounds.least_factor; step < least) step = least;
    typename Tile::Plane::Out split = out;
    if (round_plane<true>(x, s, channels_first, step, limit, scratch, split) <= how.max_outliers * s.pixels()) {
      split.finish();
      return step;
    }
  }
  const float whole = usable_step(absmax / range);
  round_plane<false>(x, s, channels_first, whole, limit, scratch, out);
  out.finish();
  return whole;
}

// Where the patches of some rows lie in their samples: calls row(sample, m), then for the lines of a patch, from
// element `at` of the row on, lines(at, pixel, pitch, count, width) of `width` pixels that follow one another, `pitch`
// from line to line, and zeros(at, count) of pixels outside; then done().
template <class Sink>
OCSQ_INLINE void for_patches(const PatchShape& s, int64_t row, int64_t rows, Sink& sink) {
  int64_t sample = row / s.rows(), out_y = row % s.rows() / s.out_w, out_x = row % s.out_w;
  const int64_t line = s.kernel_w * s.channels, pitch = s.dilation_h * s.width;
  for (int64_t m = 0; m < rows; ++m) {
    sink.row(sample, m);
    const int64_t y0 = out_y * s.stride_h - s.padding_h, x0 = out_x * s.stride_w - s.padding_w;
    // Lines [first, last) of the kernel lie inside.
    int64_t first = 0, last = s.kernel_h;
    for (int64_t y = y0; first < last && y < 0; y += s.dilation_h) ++first;
    for (int64_t y = y0 + (last - 1) * s.dilation_h; first < last && y >= s.height; y -= s.dilation_h) --last;
    if (first > 0) sink.zeros(0, first * s.kernel_w);
    const int64_t right = x0 + (s.kernel_w - 1) * s.dilation_w, begin = (y0 + first * s.dilation_h) * s.width + x0;
    if (x0 >= 0 && right < s.width && s.dilation_w == 1) {
      sink.lines(first * line, begin, pitch, last - first, s.kernel_w);
    } else {
      for (int64_t ky = first, at = first * line; ky < last; ++ky) {
        for (int64_t kx = 0; kx < s.kernel_w; ++kx, at += s.channels) {
          const int64_t right_by = kx * s.dilation_w, x = x0 + right_by;
          x < 0 || x >= s.width ? sink.zeros(at, 1) : sink.lines(at, begin + (ky - first) * pitch + right_by, 0, 1, 1);
        }
      }
    }
    if (last < s.kernel_h) sink.zeros(last * line, (s.kernel_h - last) * s.kernel_w);
    sink.done();
    if (++out_x < s.out_w) continue;
    out_x = 0;
    if (++out_y < s.out_h) continue;
    out_y = 0;
    ++sample;
  }
}

template <class Tile>
void place_patches(const Planes& planes, const PatchShape& shape, int64_t row, const PackedWeight& w,
                   const Activations& a, int64_t rows, void* scratch) {
  Tile::Plane::template place<Tile>(planes, shape, row, w, a, rows, scratch);
}

}  // namespace
}  // namespace ocsquant
