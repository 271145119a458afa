// y = quantize(x) * codes^T * step * scale + bias: check, allocate, quantize the tokens, multiply panel by panel.
#include <algorithm>

#include "check.h"
#include "core/pack.h"

namespace ocsquant {
namespace {

constexpr const char* kOp = "quantized_linear";
constexpr int64_t kMaxRowBlock = 192;
// Below this many multiplications (or quantized values) a second thread costs more than it brings.
constexpr int64_t kSerialProducts = 500'000, kSerialValues = 65'536;

void check_vector(const char* name, const Tensor& t, ScalarType dtype, int64_t size, const char* of) {
  check_tensor(kOp, name, t, dtype, 1);
  OCSQ_CHECK(t.numel() == size, kOp, ": ", name, " must have ", size, " entries, one per ", of, ", got ", t.numel());
}

void check_tail_index(const int32_t* index, int64_t e, int64_t k) {
  int64_t previous = -1;
  for (int64_t i = 0; i < e; ++i) {
    OCSQ_CHECK(index[i] > previous && index[i] < k, kOp, ": tail_index must be ascending and within 0..", k - 1,
               ", got ", index[i], " at ", i);
    previous = index[i];
  }
}

TokenQuantizer check_quantizer(int64_t bits, int64_t max_outliers, double threshold) {
  OCSQ_CHECK(bits >= 2 && bits <= 8, kOp, ": activation_bits must be 2..8, got ", bits);
  OCSQ_CHECK(max_outliers >= 0 && max_outliers <= kMaxOutliers, kOp, ": max_outliers must be 0..", kMaxOutliers,
             ", got ", max_outliers);
  OCSQ_CHECK(threshold >= kMinOutlierThreshold && threshold <= 1e6, kOp, ": outlier_threshold must be ",
             kMinOutlierThreshold, "..1e6 times the root mean square, got ", threshold);
  return {static_cast<int>(bits), static_cast<int>(max_outliers), static_cast<float>(threshold)};
}

void run(const void* x, Float dtype, int64_t m, const TokenQuantizer& how, const PackedWeight& w, void* y) {
  const LinearKernels& kernels = cpu_kernels().linear;
  const int64_t capacity = kernels.rest_capacity(w.depth(), how.max_outliers), row_bytes = kernels.row_bytes(w.depth());
  const int64_t tiles = (m + kernels.row_tile - 1) / kernels.row_tile;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t chunks = m * w.k > kSerialValues ? std::min(tiles, threads) : 1;
  const int64_t codes = align64(m * row_bytes), steps = align64(m * sizeof(float));
  const int64_t rests = align64(m * capacity * sizeof(Rest)), counts = align64(m * sizeof(int32_t));
  const int64_t scratch = align64(quantize_scratch_bytes(w, kernels.row_tile));
  const Buffer buffer(codes + steps + rests + 2 * counts + chunks * scratch);
  const Activations a = {buffer.at<uint8_t>(0),
                         buffer.at<float>(codes),
                         buffer.at<Rest>(codes + steps),
                         buffer.at<int32_t>(codes + steps + rests),
                         buffer.at<int32_t>(codes + steps + rests + counts),
                         m,
                         row_bytes,
                         capacity};
  parallel_chunks(tiles, chunks, [&](int64_t i, int64_t first, int64_t last) {
    kernels.quantize(x, dtype, how, w, a, first * kernels.row_tile, std::min(m, last * kernels.row_tile),
                     buffer.at<void>(codes + steps + rests + 2 * counts + i * scratch));
  });
  const int64_t panels = w.panels(), blocks = (m + kernels.row_block - 1) / kernels.row_block;
  const auto multiply = [&](int64_t b, int64_t e) {
    alignas(64) int32_t sums[kMaxRowBlock * kPanel];
    for (int64_t u = b; u < e; ++u) {
      const int64_t first = u / panels * kernels.row_block;
      kernels.multiply(a, w, y, dtype, first, std::min(m, first + kernels.row_block), u % panels, sums);
    }
  };
  if (m * w.n * w.k > kSerialProducts) {
    torch::stable::parallel_for(0, panels * blocks, 1, multiply);
  } else {
    multiply(0, panels * blocks);
  }
}

Tensor quantized_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& tail_index, int64_t bits, int64_t max_outliers, double threshold) {
  const Float dtype = check_float(kOp, "x", x);
  OCSQ_CHECK(x.dim() >= 1, kOp, ": x must have at least one dimension, got a scalar");
  check_tensor(kOp, "packed", packed, ScalarType::Byte, 4);
  check_tensor(kOp, "scale", scale, ScalarType::Float, 1);
  const int64_t k = x.size(-1), n = scale.numel(), e = tail_index.has_value() ? tail_index->numel() : 0;
  OCSQ_CHECK(k + e <= kMaxDepth, kOp, ": x must have at most ", kMaxDepth - e,
             " columns, the limit of exact int32 sums, got ", k);
  PackedWeight w = {nullptr, n, k, e, nullptr, nullptr, nullptr};
  OCSQ_CHECK(packed.size(0) == w.panels() && packed.size(1) == w.groups() + w.bound_blocks() &&
                 packed.size(2) == kPanel && packed.size(3) == kGroup,
             kOp, ": packed must be [", w.panels(), ", ", w.groups() + w.bound_blocks(), ", 64, 4] for ", n,
             " scales, ", k, " columns of x and ", e, " tail columns, got [", packed.size(0), ", ", packed.size(1),
             ", ", packed.size(2), ", ", packed.size(3), "]");
  const TokenQuantizer how = check_quantizer(bits, max_outliers, threshold);
  const Tensor dense_x = dense(x), dense_packed = dense(packed), dense_scale = dense(scale);
  std::optional<Tensor> dense_bias, dense_index;
  if (bias.has_value()) {
    check_vector("bias", *bias, ScalarType::Float, n, "output");
    dense_bias = dense(*bias);
    w.bias = dense_bias->const_data_ptr<float>();
  }
  if (tail_index.has_value()) {
    check_vector("tail_index", *tail_index, ScalarType::Int, e, "tail column");
    dense_index = dense(*tail_index);
    w.tail_index = dense_index->const_data_ptr<int32_t>();
    check_tail_index(w.tail_index, e, k);
  }
  w.packed = dense_packed.const_data_ptr<uint8_t>();
  w.scale = dense_scale.const_data_ptr<float>();
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = n;
  Tensor y = empty_cpu(sizes, x.scalar_type());
  int64_t m = 1;
  for (size_t d = 0; d + 1 < sizes.size(); ++d) m *= sizes[d];
  if (m > 0 && n > 0) run(dense_x.const_data_ptr(), dtype, m, how, w, y.mutable_data_ptr());
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_linear_train", TORCH_BOX(&quantized_linear));
}

}  // namespace
}  // namespace ocsquant
