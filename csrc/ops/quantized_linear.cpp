// y = quantize(x) * codes^T * step * scale + bias: check, allocate, quantize the tokens, multiply panel by panel.
#include <algorithm>
#include <iterator>

#include "linear.h"

namespace ocsquant {

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t size, const char* of) {
  check_tensor(op, name, t, dtype, 1);
  OCSQ_CHECK(t.numel() == size, op, ": ", name, " must have ", size, " entries, one per ", of, ", got ", t.numel());
}

namespace {

constexpr int64_t kMaxRowBlock = 192;
// Below this many multiplications (or quantized values) a second thread costs more than it brings.
constexpr int64_t kSerialProducts = 500'000, kSerialValues = 65'536;

void check_tail_index(const char* op, const int32_t* index, int64_t e, int64_t k) {
  int64_t previous = -1;
  for (int64_t i = 0; i < e; ++i) {
    OCSQ_CHECK(index[i] > previous && index[i] < k, op, ": tail_index must be ascending and within 0..", k - 1,
               ", got ", index[i], " at ", i);
    previous = index[i];
  }
}

}  // namespace

int64_t even_rows(int64_t rows, int64_t limit, int64_t tile, int64_t threads) {
  const int64_t blocks = (rows + limit - 1) / limit;
  if (blocks <= 1) return limit;
  const int64_t even = (blocks + threads - 1) / threads * threads;
  return std::min(limit, ((rows + even - 1) / even + tile - 1) / tile * tile);
}

// Block by block of rows, as many for each thread as multiply() takes at a time: what was quantized is still in the
// cache when it is multiplied.
void run_linears(const void* x, Float dtype, int64_t m, const TokenQuantizer& how, const Product* products,
                 int64_t count) {
  const PackedWeight& w = products[0].w;  // what is quantized fits all of them
  int64_t panels = 0, outputs = 0;
  for (int64_t p = 0; p < count; ++p) {
    panels += products[p].w.panels();
    outputs += products[p].w.n;
  }
  const LinearKernels& kernels = cpu_kernels().linear;
  const int64_t capacity = kernels.rest_capacity(w.depth(), how.max_outliers), row_bytes = kernels.row_bytes(w.depth());
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t row_block = even_rows(m, kernels.row_block, kernels.row_tile, threads);
  const int64_t rows = std::min(m, row_block * threads);
  const int64_t tiles = (rows + kernels.row_tile - 1) / kernels.row_tile;
  const int64_t chunks = rows * w.k > kSerialValues ? std::min(tiles, threads) : 1;
  const int64_t codes = align64(rows * row_bytes), steps = align64(rows * sizeof(float));
  const int64_t rests = align64(rows * capacity * sizeof(Rest)), counts = align64(rows * sizeof(int32_t));
  const int64_t scratch = align64(quantize_scratch_bytes(w, kernels.row_tile));
  const int64_t groups = w.group_channels > 0 ? align64(rows * w.scale_groups() * sizeof(int32_t)) : 0;
  const int64_t fixed = codes + steps + rests + 2 * counts;
  const Buffer buffer(fixed + groups + chunks * scratch);
  const Activations a = {buffer.at<uint8_t>(0),
                         buffer.at<float>(codes),
                         buffer.at<Rest>(codes + steps),
                         buffer.at<int32_t>(codes + steps + rests),
                         buffer.at<int32_t>(codes + steps + rests + counts),
                         groups > 0 ? buffer.at<int32_t>(fixed) : nullptr,
                         rows,
                         row_bytes,
                         capacity};
  const int64_t value_bytes = dtype == Float::f32 ? sizeof(float) : sizeof(uint16_t);
  for (int64_t begin = 0; begin < m; begin += rows) {
    const int64_t left = std::min(rows, m - begin), left_tiles = (left + kernels.row_tile - 1) / kernels.row_tile;
    const void* from = static_cast<const uint8_t*>(x) + begin * w.k * value_bytes;
    parallel_chunks(left_tiles, std::min(chunks, left_tiles), [&](int64_t i, int64_t first, int64_t last) {
      kernels.quantize(from, dtype, how, w, a, first * kernels.row_tile, std::min(left, last * kernels.row_tile),
                       buffer.at<void>(fixed + groups + i * scratch));
    });
    const int64_t blocks = (left + row_block - 1) / row_block;
    const auto multiply = [&](int64_t b, int64_t e) {
      alignas(64) uint8_t part[kUnpackedGroups * kGroupBytes + 2 * kMaxRowBlock * kPanel * sizeof(int32_t)];
      for (int64_t u = b; u < e; ++u) {
        const int64_t first = u / panels * row_block;
        int64_t panel = u % panels;
        const Product* product = products;
        for (; panel >= product->w.panels(); ++product) panel -= product->w.panels();
        void* to = static_cast<uint8_t*>(product->y) + begin * product->w.n * value_bytes;
        (groups > 0 ? kernels.multiply_groups : kernels.multiply)(a, product->w, to, dtype, first,
                                                                  std::min(left, first + row_block), panel, part);
      }
    };
    if (left * outputs * w.k > kSerialProducts) {
      torch::stable::parallel_for(0, panels * blocks, 1, multiply);
    } else {
      multiply(0, panels * blocks);
    }
  }
}

Nonlinearity check_nonlinearity(const char* op, const std::string& name) {
  // In the order of Nonlinearity.
  constexpr const char* kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"};
  const auto found = std::find(std::begin(kNames), std::end(kNames), name);
  OCSQ_CHECK(found != std::end(kNames), op,
             ": nonlinearity must be none, relu, gelu, gelu_tanh, silu, sigmoid or tanh, got ", name);
  return static_cast<Nonlinearity>(found - std::begin(kNames));
}

TokenQuantizer check_quantizer(const char* op, int64_t bits, int64_t max_outliers, double threshold) {
  OCSQ_CHECK(bits >= 2 && bits <= 8, op, ": activation_bits must be 2..8, got ", bits);
  OCSQ_CHECK(max_outliers >= 0 && max_outliers <= kMaxOutliers, op, ": max_outliers must be 0..", kMaxOutliers,
             ", got ", max_outliers);
  OCSQ_CHECK(threshold >= kMinOutlierThreshold && threshold <= 1e6, op, ": outlier_threshold must be ",
             kMinOutlierThreshold, "..1e6 times the root mean square, got ", threshold);
  return {static_cast<int>(bits), static_cast<int>(max_outliers), static_cast<float>(threshold)};
}

namespace {

PackedForm form_of(const char* op, const WeightOperands& t, int64_t k) {
  check_tensor(op, "packed", t.packed, ScalarType::Byte, 4);
  t.storage.check(op);
  check_tensor(op, "scale", t.scale, ScalarType::Float, t.storage.group_size > 0 ? 2 : 1);
  return PackedForm(op, t.scale.size(-1), k, t.tail_index.has_value() ? t.tail_index->numel() : 0, t.storage);
}

}  // namespace

LinearWeight::LinearWeight(const char* op, const WeightOperands& t, int64_t k, int64_t limit)
    : form_(form_of(op, t, k)), packed_(dense(t.packed)), scale_(dense(t.scale)) {
  PackedWeight& w = form_.weight;
  OCSQ_CHECK(k + w.tail <= limit, op, ": x must have at most ", limit - w.tail,
             " columns, the limit of exact int32 sums, got ", k);
  OCSQ_CHECK(w.group_channels == 0 || t.scale.size(0) == w.scale_groups(), op, ": scale must be [", w.scale_groups(),
             ", outputs] for ", k, " columns of x in groups of ", w.group_channels, ", got ", t.scale.size(0),
             " groups");
  form_.check_sizes(op, t.packed);
  if (t.bias.has_value()) {
    check_vector(op, "bias", *t.bias, ScalarType::Float, w.n, "output");
    bias_ = dense(*t.bias);
    w.bias = bias_->const_data_ptr<float>();
  }
  if (t.tail_index.has_value()) {
    check_vector(op, "tail_index", *t.tail_index, ScalarType::Int, w.tail, "tail column");
    index_ = dense(*t.tail_index);
    w.tail_index = index_->const_data_ptr<int32_t>();
    check_tail_index(op, w.tail_index, w.tail, k);
  }
  w.packed = packed_.const_data_ptr<uint8_t>();
  w.scale = scale_.const_data_ptr<float>();
  w.nonlinearity = t.nonlinearity;
}

int64_t tokens_of(const Tensor& x) {
  int64_t m = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) m *= x.size(d);
  return m;
}

Tensor empty_output(const Tensor& x, int64_t n) {
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = n;
  return empty_cpu(sizes, x.scalar_type());
}

Tensor linear(const char* op, const Tensor& x, const WeightOperands& operands, const TokenQuantizer& how) {
  const Float dtype = check_float(op, "x", x);
  OCSQ_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar");
  const LinearWeight weight(op, operands, x.size(-1), how.fixed ? kMaxFixedDepth : kMaxDepth);
  const int64_t n = weight.weight().n, m = tokens_of(x);
  Tensor y = empty_output(x, n);
  if (m > 0 && n > 0) run_linear(dense(x).const_data_ptr(), dtype, m, how, weight.weight(), y.mutable_data_ptr());
  return y;
}

namespace {

constexpr const char* kOp = "quantized_linear";

Tensor quantized_linear_nonlinear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                  const std::optional<Tensor>& bias, const std::optional<Tensor>& tail_index,
                                  int64_t bits, int64_t max_outliers, double threshold, int64_t group_size,
                                  int64_t weight_bits, const std::optional<Tensor>& zero,
                                  const std::optional<Tensor>& levels, const std::string& nonlinearity) {
  const Storage storage = {weight_bits, zero, levels, group_size};
  return linear(kOp, x, {packed, scale, bias, tail_index, storage, check_nonlinearity(kOp, nonlinearity)},
                check_quantizer(kOp, bits, max_outliers, threshold));
}

Tensor quantized_linear_narrow(const Tensor& x, const Tensor& packed, const Tensor& scale,
                               const std::optional<Tensor>& bias, const std::optional<Tensor>& tail_index, int64_t bits,
                               int64_t max_outliers, double threshold, int64_t group_size, int64_t weight_bits,
                               const std::optional<Tensor>& zero, const std::optional<Tensor>& levels) {
  const Storage storage = {weight_bits, zero, levels, group_size};
  return linear(kOp, x, {packed, scale, bias, tail_index, storage},
                check_quantizer(kOp, bits, max_outliers, threshold));
}

Tensor quantized_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const std::optional<Tensor>& bias,
                        const std::optional<Tensor>& tail_index, int64_t bits, int64_t max_outliers, double threshold,
                        int64_t group_size) {
  const std::optional<Tensor> none;
  return quantized_linear_narrow(x, packed, scale, bias, tail_index, bits, max_outliers, threshold, group_size, 8, none,
                                 none);
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_linear_narrow", TORCH_BOX(&quantized_linear_narrow));
  m.impl("quantized_linear_nonlinear", TORCH_BOX(&quantized_linear_nonlinear));
  m.impl("quantized_linear_train", TORCH_BOX(&quantized_linear_narrow));
}

}  // namespace
}  // namespace ocsquant
