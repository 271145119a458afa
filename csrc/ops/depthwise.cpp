// Convolutions of single channels: every channel of a sample quantized once, all its outputs from its plane of codes.
#include <algorithm>

#include "convolution.h"
#include "core/pack.h"

namespace ocsquant {
namespace {

constexpr int64_t kChannels = 16;  // at a time, so that those of pixels that lie channels last fill cache lines

// [outputs][taps]: those of split channels together.
std::vector<int32_t> taps_of(const PackedWeight& w) {
  std::vector<int8_t> codes(w.n * w.k), tail(w.n * w.tail);
  unpack_panels(w, codes.data(), tail.data());
  std::vector<int32_t> taps(codes.begin(), codes.end());
  for (int64_t j = 0; j < w.n; ++j) {
    for (int64_t e = 0; e < w.tail; ++e) taps[j * w.k + w.tail_index[e]] += tail[j * w.tail + e];
  }
  return taps;
}

}  // namespace

void run_depthwise(const Convolution& c) {
  const Kernels& kernels = cpu_kernels();
  const PatchShape& s = c.shape;
  const PackedWeight& w = c.w;
  const std::vector<int32_t> taps = taps_of(w);
  const PlaneBounds bounds = plane_bounds(s.depth(), w.tail);
  const int64_t pixels = s.pixels(), rows = s.rows(), channels = c.groups, period = pixel_period(1);
  const int64_t blocks = (channels + kChannels - 1) / kChannels, parts = c.samples * blocks;
  const bool serial = c.samples * channels * pixels * s.depth() <= kSerialProducts;
  const int64_t chunks = serial ? 1 : std::min<int64_t>(parts, torch::stable::get_num_threads());
  const int64_t sizes[] = {align64(c.channels_last ? kChannels * pixels * sizeof(float) : 0),
                           align64(kernels.convolution.channel_bytes(s, c.how.max_outliers)),
                           align64(2 * period * sizeof(float)), align64(kernels.convolution.channel_scratch_bytes(s)),
                           align64(kChannels * c.n * rows * sizeof(float) + 64)};
  int64_t each = 0;
  for (const int64_t size : sizes) each += size;
  const Buffer buffer(chunks * each);
  parallel_chunks(parts, chunks, [&](int64_t i, int64_t begin, int64_t end) {
    float* turned = buffer.at<float>(i * each);
    uint8_t* plane = buffer.at<uint8_t>(i * each + sizes[0]);
    float* scales = buffer.at<float>(i * each + sizes[0] + sizes[1]);
    void* scratch = buffer.at<void>(i * each + sizes[0] + sizes[1] + sizes[2]);
    float* outputs = buffer.at<float>(i * each + sizes[0] + sizes[1] + sizes[2] + sizes[3]);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t sample = part / blocks, first = part % blocks * kChannels;
      const int64_t count = std::min(kChannels, channels - first);
      const float* x = c.x + sample * channels * pixels + (c.channels_last ? first : first * pixels);
      if (c.channels_last) {
        kernels.convolution.transpose(x, channels, pixels, count, turned, pixels);
        x = turned;
      }
      for (int64_t channel = 0; channel < count; ++channel) {
        TokenQuantizer how = c.how;
        if (how.inverse != nullptr) {
          how.inverse = scales;
          std::fill_n(scales, period, c.how.inverse[first + channel]);
        }
        if (how.shift != nullptr) {
          how.shift = scales + period;
          std::fill_n(scales + period, period, c.how.shift[first + channel]);
        }
        const float step =
            kernels.convolution.quantize_channel(x + channel * pixels, s, false, how, bounds, nullptr, plane);
        for (int64_t o = 0; o < c.n; ++o) {
          const int64_t j = (first + channel) * c.n + o;
          float* y = outputs + (channel * c.n + o) * rows;
          kernels.convolution.convolve_channel(plane, s, taps.data() + j * w.k, step * w.scale[j],
                                               w.bias != nullptr ? w.bias + j : nullptr, scratch, y);
          kernels.nonlinear(w.nonlinearity, rows, y);  // and what is behind, which comes next or is room for it
        }
      }
      float* to = c.y + sample * w.n * rows + (c.channels_last ? first * c.n : first * c.n * rows);
      if (c.channels_last) {
        kernels.convolution.transpose(outputs, rows, count * c.n, rows, to, w.n);
      } else {
        std::copy_n(outputs, count * c.n * rows, to);
      }
    }
  });
}

}  // namespace ocsquant
