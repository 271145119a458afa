// A convolution in integers: each group of a sample's channels quantized once, its patches multiplied as rows of a
// linear, block by block.
#include <algorithm>
#include <limits>
#include <utility>

#include "convolution.h"

namespace ocsquant {
namespace {

constexpr int64_t kFewOutputs = 8;          // of a single channel: a product has 64 for the price of one
constexpr int64_t kBlockBytes = 192 << 10;  // of a block's codes: they should stay in the second cache

int64_t out_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  return (size + 2 * padding - dilation * (kernel - 1) - 1) / stride + 1;
}

void check_pair(const char* name, int64_t h, int64_t w, int64_t least) {
  OCSQ_CHECK(h >= least && w >= least && h < 1 << 20 && w < 1 << 20, "quantized_conv2d: ", name, "_h and ", name,
             "_w must be within ", least, "..1048575, got ", h, " and ", w);
}

// As torch sees it: of sizes of 1 the stride does not matter.
bool is_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  const int64_t order[] = {1, 3, 2, 0};
  int64_t stride = 1;
  for (const int64_t d : order) {
    if (x.size(d) != 1 && x.stride(d) != stride) return false;
    stride *= x.size(d);
  }
  return true;
}

Convolution of_group(const Convolution& all, int64_t group) {
  Convolution c = all;
  const PackedWeight& w = all.w;
  const int64_t first = group * c.n, panel = first / kPanel;
  c.group = group;
  c.before = first - panel * kPanel;
  c.w.packed = w.packed + panel * w.panel_bytes();
  c.w.scale = w.scale + panel * kPanel;
  if (w.bias != nullptr) c.w.bias = w.bias + panel * kPanel;
  if (w.zero != nullptr) c.w.zero = w.zero + panel * kPanel;
  if (c.how.inverse != nullptr) c.how.inverse += group * c.shape.channels;
  if (c.how.shift != nullptr) c.how.shift += group * c.shape.channels;
  c.w.n = std::min(w.n - panel * kPanel, (c.before + c.n + kPanel - 1) / kPanel * kPanel);
  return c;
}

void copy_pixels(const float* from, int64_t pitch, int64_t count, int64_t channels, float* to) {
  if (pitch == channels) {
    std::copy_n(from, count * channels, to);
    return;
  }
  for (int64_t i = 0; i < count; ++i) std::copy_n(from + i * pitch, channels, to + i * channels);
}

// Places rows [first, first + count) into `a`.
using Fill = void (*)(const Convolution& c, const Planes& planes, int64_t first, int64_t count, const Activations& a,
                      float* pixels, void* scratch);

void fill_patches(const Convolution& c, const Planes& planes, int64_t first, int64_t count, const Activations& a,
                  float*, void* scratch) {
  cpu_kernels().convolution.place_patches(planes, c.shape, first, c.w, a, count, scratch);
}

// Kernels of one element: each pixel is a token. Runs of pixels of a line are turned together.
void fill_pixels(const Convolution& c, const Planes&, int64_t first, int64_t count, const Activations& a, float* pixels,
                 void* scratch) {
  const PatchShape& s = c.shape;
  for (int64_t i = 0, run; i < count; i += run) {
    const int64_t sample = (first + i) / s.rows(), pixel = (first + i) % s.rows();
    const int64_t line = pixel / s.out_w, column = pixel % s.out_w;
    const bool all = s.stride_h == 1 && s.stride_w == 1;
    run = std::min(count - i, all ? s.rows() - pixel : s.stride_w == 1 ? s.out_w - column : 1);
    const int64_t from = line * s.stride_h * s.width + column * s.stride_w;
    float* to = pixels + i * s.channels;
    if (c.channels_last) {
      copy_pixels(c.sample(sample) + from * c.pitch_in(), c.pitch_in(), run, s.channels, to);
    } else {
      cpu_kernels().convolution.transpose(c.sample(sample) + from, s.pixels(), s.channels, run, to, s.channels);
    }
  }
  cpu_kernels().linear.quantize(pixels, Float::f32, c.how, c.w, a, 0, count, scratch);
}

// The group's columns of rows [count][w.n] from `first` on, to where y has them.
void store_rows(const Convolution& c, const float* block, int64_t first, int64_t count) {
  const int64_t pixels = c.shape.rows();
  for (int64_t i = 0, run; i < count; i += run) {
    const int64_t sample = (first + i) / pixels, pixel = (first + i) % pixels;
    const float* from = block + i * c.w.n + c.before;
    run = std::min(count - i, pixels - pixel);
    if (c.channels_last) {
      float* to = c.output(sample) + pixel * c.pitch_out();
      for (int64_t r = 0; r < run; ++r) std::copy_n(from + r * c.w.n, c.n, to + r * c.pitch_out());
    } else {
      cpu_kernels().convolution.transpose(from, c.w.n, run, c.n, c.output(sample) + pixel, pixels);
    }
  }
}

void multiply_blocks(const Convolution& c, const Planes& planes, int64_t max_rests, Fill fill) {
  const LinearKernels& kernels = cpu_kernels().linear;
  const PackedWeight& w = c.w;
  const int64_t tile = kernels.row_tile, capacity = kernels.rest_capacity(w.depth(), static_cast<int>(max_rests));
  const int64_t row_bytes = kernels.row_bytes(w.depth());
  const int64_t fitting = std::max<int64_t>(tile, kBlockBytes / std::max<int64_t>(row_bytes, 1) / tile * tile);
  const bool serial = c.rows() * w.n * w.k <= kSerialProducts;
  const int64_t threads = serial ? 1 : torch::stable::get_num_threads();
  const int64_t even = even_rows(c.rows(), std::min(kernels.row_block, fitting), tile, threads);
  const int64_t block = std::min(even, (c.rows() + tile - 1) / tile * tile);
  const int64_t blocks = (c.rows() + block - 1) / block, chunks = std::min(threads, blocks);
  const int64_t groups = w.group_channels > 0 ? w.scale_groups() : 0;
  // The product with group scales has one half of its room behind kernels.row_block rows of the other.
  const int64_t sums = (groups > 0 ? kernels.row_block : block) * kPanel;
  const int64_t sizes[] = {align64(block * row_bytes),
                           align64(block * sizeof(float)),
                           align64(block * capacity * sizeof(Rest)),
                           align64(block * sizeof(int32_t)),
                           align64(block * sizeof(int32_t)),
                           align64(quantize_scratch_bytes(w, tile)),
                           align64(kUnpackedGroups * kGroupBytes + (groups > 0 ? 2 : 1) * sums * sizeof(int32_t)),
                           align64(fill == fill_pixels ? block * c.shape.channels * sizeof(float) : 0),
                           align64(c.in_place() ? 0 : block * w.n * sizeof(float)),
                           align64(block * groups * sizeof(int32_t))};
  int64_t each = 0;
  for (const int64_t size : sizes) each += size;
  const Buffer buffer(chunks * each);
  parallel_chunks(blocks, chunks, [&](int64_t i, int64_t begin, int64_t end) {
    uint8_t* part[std::size(sizes)];
    int64_t at = i * each;
    for (size_t p = 0; p < std::size(sizes); ++p) part[p] = buffer.at<uint8_t>(std::exchange(at, at + sizes[p]));
    const Activations a = {part[0],
                           reinterpret_cast<float*>(part[1]),
                           reinterpret_cast<Rest*>(part[2]),
                           reinterpret_cast<int32_t*>(part[3]),
                           reinterpret_cast<int32_t*>(part[4]),
                           groups > 0 ? reinterpret_cast<int32_t*>(part[9]) : nullptr,
                           block,
                           row_bytes,
                           capacity};
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * block, count = std::min(block, c.rows() - first);
      fill(c, planes, first, count, a, reinterpret_cast<float*>(part[7]), part[5]);
      float* rows = c.in_place() ? c.y + first * w.n : reinterpret_cast<float*>(part[8]);
      for (int64_t panel = 0; panel < w.panels(); ++panel) {
        (groups > 0 ? kernels.multiply_groups : kernels.multiply)(a, w, rows, Float::f32, 0, count, panel, part[6]);
      }
      if (!c.in_place()) store_rows(c, rows, first, count);
    }
  });
}

// to[count] = the channels, again and again.
void repeat(const float* channels, int64_t each, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += each) std::copy_n(channels, each, to + i);
}

// Every sample to codes once, then its patches.
void run_patches(const Convolution& c) {
  const ConvolutionKernels& kernels = cpu_kernels().convolution;
  const PatchShape& s = c.shape;
  const int64_t plane = kernels.plane_bytes(s, c.how.max_outliers), steps = align64(c.samples * sizeof(float));
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks = c.samples * s.values() > kSerialProducts ? std::min(c.samples, threads) : 1;
  const bool apart = c.channels_last && c.groups > 1;
  const int64_t turned = apart ? s.pixels() : c.channels_last ? 0 : kPlanePixels;
  const int64_t scratch = align64(turned * s.channels * sizeof(float));
  const int64_t repeated = c.how.fixed ? pixel_period(s.channels) * s.channels : 0;
  const int64_t scales = align64(repeated * sizeof(float)), fixed = steps + 2 * scales;
  const Buffer buffer(fixed + chunks * scratch + c.samples * plane);
  const PlaneBounds bounds = plane_bounds(s.depth(), c.w.tail);
  float* step = buffer.at<float>(0);
  uint8_t* first = buffer.at<uint8_t>(fixed + chunks * scratch);
  TokenQuantizer how = c.how;
  for (const float** channels : {&how.inverse, &how.shift}) {
    if (*channels == nullptr) continue;
    float* to = buffer.at<float>(steps + (channels == &how.shift ? scales : 0));
    repeat(*channels, s.channels, repeated, to);
    *channels = to;
  }
  parallel_chunks(c.samples, chunks, [&](int64_t i, int64_t begin, int64_t end) {
    float* turning = buffer.at<float>(fixed + i * scratch);
    for (int64_t sample = begin; sample < end; ++sample) {
      const float* x = c.sample(sample);
      if (apart) {
        copy_pixels(x, c.pitch_in(), s.pixels(), s.channels, turning);
        x = turning;
      }
      step[sample] = kernels.quantize_plane(x, s, !c.channels_last, how, bounds, turning, first + sample * plane);
    }
  });
  int64_t most = 0;
  for (int64_t i = 0; i < c.samples && c.how.max_outliers > 0; ++i) {
    most = std::max(most, kernels.largest_outliers(first + i * plane, s));
  }
  multiply_blocks(c, {first, plane, step}, std::min(most * s.kernel_h * s.kernel_w, s.depth()), fill_patches);
}

// As the kernels add it to y: with its strides, and whole floats away.
Tensor as_laid_out(const Tensor& t, const Tensor& y, bool channels_last) {
  const bool aligned = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % alignof(float) == 0;
  if (aligned && (channels_last ? is_channels_last(t) : t.is_contiguous())) return t;
  Tensor same = channels_last ? empty_cpu(sizes_of(y), ScalarType::Float, {0, 2, 3, 1})
                              : empty_cpu(sizes_of(y), ScalarType::Float);
  return torch::stable::copy_(same, t);
}

Tensor quantized_conv2d(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& tail_index, int64_t kernel_h, int64_t kernel_w, int64_t stride_h,
                        int64_t stride_w, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w,
                        int64_t bits, int64_t max_outliers, double threshold, int64_t weight_bits,
                        const std::optional<Tensor>& zero, const std::optional<Tensor>& levels, int64_t groups,
                        const std::optional<Tensor>& input_inverse, const std::optional<Tensor>& input_shift,
                        const std::string& nonlinearity, const std::optional<Tensor>& residual, int64_t group_size) {
  constexpr const char* kOp = "quantized_conv2d";
  check_tensor(kOp, "x", x, ScalarType::Float, 4);
  TokenQuantizer how = check_quantizer(kOp, bits, max_outliers, threshold);
  check_pair("kernel", kernel_h, kernel_w, 1);
  check_pair("stride", stride_h, stride_w, 1);
  check_pair("padding", padding_h, padding_w, 0);
  check_pair("dilation", dilation_h, dilation_w, 1);
  OCSQ_CHECK(groups >= 1 && x.size(1) % groups == 0, kOp, ": groups must divide the ", x.size(1),
             " channels of x, got ", groups);
  const int64_t height = x.size(2), width = x.size(3);
  const int64_t out_h = out_size(height, kernel_h, stride_h, padding_h, dilation_h);
  const int64_t out_w = out_size(width, kernel_w, stride_w, padding_w, dilation_w);
  OCSQ_CHECK(
      height + 2 * padding_h > dilation_h * (kernel_h - 1) && width + 2 * padding_w > dilation_w * (kernel_w - 1), kOp,
      ": x must be as large as the kernel with its dilation, got ", height, " x ", width);
  const PatchShape s = {x.size(1) / groups, height,    width,      kernel_h,   kernel_w, stride_h, stride_w,
                        padding_h,          padding_w, dilation_h, dilation_w, out_h,    out_w};
  how.fixed = input_inverse.has_value();
  std::optional<Tensor> inverse, shift;
  if (how.fixed) {
    check_vector(kOp, "input_inverse", *input_inverse, ScalarType::Float, x.size(1), "channel of x");
    inverse = dense(*input_inverse);
    how.inverse = inverse->const_data_ptr<float>();
  }
  if (input_shift.has_value()) {
    OCSQ_CHECK(how.fixed, kOp, ": input_shift needs input_inverse");
    OCSQ_CHECK(padding_h == 0 && padding_w == 0, kOp, ": input_shift needs padding 0 (a shifted zero is no zero), got ",
               padding_h, " and ", padding_w);
    check_vector(kOp, "input_shift", *input_shift, ScalarType::Float, x.size(1), "channel of x");
    shift = dense(*input_shift);
    how.shift = shift->const_data_ptr<float>();
  }
  const Storage storage = {weight_bits, zero, levels, group_size};
  const LinearWeight weight(kOp, {packed, scale, bias, tail_index, storage, check_nonlinearity(kOp, nonlinearity)},
                            s.depth(), how.fixed ? kMaxFixedDepth : kMaxDepth);
  OCSQ_CHECK(s.values() <= std::numeric_limits<int32_t>::max(), kOp,
             ": x must have fewer than 2^31 values a sample, got ", s.values());
  const PackedWeight& w = weight.weight();
  OCSQ_CHECK(w.n % groups == 0, kOp, ": groups must divide the ", w.n, " outputs, got ", groups);
  OCSQ_CHECK(group_size == 0 || groups == 1, kOp, ": group_size needs groups 1, got ", groups);
  const int64_t samples = x.size(0);
  const bool last = is_channels_last(x);
  const Tensor source = last ? x : dense(x);
  Tensor y = last ? empty_cpu({samples, w.n, out_h, out_w}, ScalarType::Float, {0, 2, 3, 1})
                  : empty_cpu({samples, w.n, out_h, out_w}, ScalarType::Float);
  std::optional<Tensor> others;
  if (residual.has_value()) {
    check_tensor(kOp, "residual", *residual, ScalarType::Float, 4);
    OCSQ_CHECK(sizes_of(*residual) == sizes_of(y), kOp, ": residual must have the sizes of the output, ", samples,
               " x ", w.n, " x ", out_h, " x ", out_w);
    others = as_laid_out(*residual, y, last);
  }
  if (samples == 0 || w.n == 0) return y;
  Convolution whole = {source.const_data_ptr<float>(),
                       y.mutable_data_ptr<float>(),
                       last,
                       samples,
                       groups,
                       0,
                       s,
                       w,
                       0,
                       w.n / groups,
                       how};
  const bool apart = others.has_value() && !(whole.in_place() && group_size == 0);
  if (apart) {
    whole.w.nonlinearity = Nonlinearity::none;
  } else if (others.has_value()) {
    const intptr_t from = reinterpret_cast<intptr_t>(whole.y),
                   to = reinterpret_cast<intptr_t>(others->const_data_ptr());
    whole.w.residual = (to - from) / static_cast<intptr_t>(sizeof(float));
  }
  const bool pixels = kernel_h == 1 && kernel_w == 1 && padding_h == 0 && padding_w == 0;
  if (pixels && whole.in_place() && stride_h == 1 && stride_w == 1) {
    run_linear(whole.x, Float::f32, whole.rows(), how, whole.w, whole.y);
  } else if (s.channels == 1 && groups > 1 && whole.n <= kFewOutputs && !pixels) {
    run_depthwise(whole);
  } else {
    for (int64_t group = 0; group < groups; ++group) {
      const Convolution c = of_group(whole, group);
      pixels ? multiply_blocks(c, {}, how.max_outliers, fill_pixels) : run_patches(c);
    }
  }
  if (apart) finish_outputs(whole.y, others->const_data_ptr<float>(), y.numel(), w.nonlinearity);
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) { m.impl("quantized_conv2d", TORCH_BOX(&quantized_conv2d)); }

}  // namespace
}  // namespace ocsquant
