// Quantize and dequantize a weight whose input channels may have n_c times the code range; straight-through gradients.
#include <algorithm>
#include <tuple>

#include "check.h"

namespace ocsquant {
namespace {

constexpr int64_t kSerialValues = 65'536;

// x as rows of one output each; every row has the same limits.
struct Rows {
  Float dtype;
  int64_t n, k;
  bool shared_scale;
  std::vector<float> limit;  // [k]: n_c (2^(bits-1) - 1), per channel repeated over a kernel's positions
};

Rows check_rows(const char* op, const Tensor& x, const Tensor& scale, const Tensor& splits, int64_t bits) {
  Rows rows = {check_float(op, "x", x), 0, 0, false, {}};
  OCSQ_CHECK(x.dim() >= 2, op, ": x must be [outputs, input channels, ...], got ", x.dim(), " dimensions");
  OCSQ_CHECK(bits >= 2 && bits <= 8, op, ": bits must be 2..8, got ", bits);
  check_tensor(op, "splits", splits, ScalarType::Int, 1);
  OCSQ_CHECK(splits.numel() == x.size(1), op, ": splits must have ", x.size(1), " entries, one per input channel, got ",
             splits.numel());
  OCSQ_CHECK(scale.defined() && scale.is_cpu() && scale.scalar_type() == ScalarType::Float && scale.dim() <= 1, op,
             ": scale must be a float32 scalar or vector on the CPU");
  rows.n = x.size(0);
  rows.shared_scale = scale.dim() == 0;
  OCSQ_CHECK(rows.shared_scale || scale.numel() == rows.n, op, ": scale must be a scalar or have ", rows.n,
             " entries, one per output, got ", scale.numel());
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  rows.k = x.size(1) * positions;
  if (x.numel() == 0) return rows;
  rows.limit.resize(rows.k);
  const Tensor counts = dense(splits);
  const int32_t* count = counts.const_data_ptr<int32_t>();
  for (int64_t c = 0; c < x.size(1); ++c) {
    OCSQ_CHECK(count[c] >= 1, op, ": splits must be at least 1, got ", count[c], " at ", c);
    const float limit = static_cast<float>(count[c]) * static_cast<float>((1 << (bits - 1)) - 1);
    std::fill_n(rows.limit.begin() + c * positions, positions, limit);
  }
  return rows;
}

int64_t chunks_for(const Rows& rows) {
  return rows.n * rows.k > kSerialValues ? std::min<int64_t>(rows.n, torch::stable::get_num_threads()) : 1;
}

Tensor fake_quantize_split(const Tensor& x, const Tensor& scale, const Tensor& splits, int64_t bits) {
  const Rows rows = check_rows("fake_quantize_split", x, scale, splits, bits);
  const Tensor dense_x = dense(x), dense_scale = dense(scale);
  Tensor y = empty_cpu(sizes_of(x), x.scalar_type());
  if (rows.n * rows.k == 0) return y;
  const Kernels& kernels = cpu_kernels();
  const float* s = dense_scale.const_data_ptr<float>();
  const void* px = dense_x.const_data_ptr();
  void* py = y.mutable_data_ptr();
  const int64_t chunks = chunks_for(rows), k = rows.k;
  const Buffer wide(rows.dtype == Float::bf16 ? chunks * k * sizeof(float) : 0);
  parallel_chunks(rows.n, chunks, [&](int64_t i, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float step = s[rows.shared_scale ? 0 : r];
      if (rows.dtype == Float::f32) {
        kernels.fake_quantize_split.forward(static_cast<const float*>(px) + r * k, rows.limit.data(), step, k,
                                            static_cast<float*>(py) + r * k);
      } else {
        float* row = wide.at<float>(0) + i * k;
        kernels.widen(static_cast<const uint16_t*>(px) + r * k, k, row);
        kernels.fake_quantize_split.forward(row, rows.limit.data(), step, k, row);
        kernels.narrow(row, k, static_cast<uint16_t*>(py) + r * k);
      }
    }
  });
  return y;
}

std::tuple<Tensor, Tensor> fake_quantize_split_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                                        const Tensor& splits, int64_t bits) {
  const char* op = "fake_quantize_split_backward";
  const Rows rows = check_rows(op, x, scale, splits, bits);
  OCSQ_CHECK(check_float(op, "grad", grad) == rows.dtype && sizes_of(grad) == sizes_of(x), op,
             ": grad must have the shape and dtype of x");
  const Tensor dense_grad = dense(grad), dense_x = dense(x), dense_scale = dense(scale);
  Tensor dx = empty_cpu(sizes_of(x), x.scalar_type()), dscale = empty_cpu(sizes_of(scale), ScalarType::Float);
  float* out = dscale.mutable_data_ptr<float>();
  if (x.numel() == 0) {
    std::fill_n(out, scale.numel(), 0.0f);
    return {dx, dscale};
  }
  const Kernels& kernels = cpu_kernels();
  const float* s = dense_scale.const_data_ptr<float>();
  const void *pg = dense_grad.const_data_ptr(), *px = dense_x.const_data_ptr();
  void* pd = dx.mutable_data_ptr();
  const int64_t chunks = chunks_for(rows), k = rows.k;
  const Buffer wide(rows.dtype == Float::bf16 ? 2 * chunks * k * sizeof(float) : 0), sums(rows.n * sizeof(float));
  float* sum = sums.at<float>(0);
  parallel_chunks(rows.n, chunks, [&](int64_t i, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      const float step = s[rows.shared_scale ? 0 : r];
      if (rows.dtype == Float::f32) {
        sum[r] = kernels.fake_quantize_split.backward(static_cast<const float*>(pg) + r * k,
                                                      static_cast<const float*>(px) + r * k, rows.limit.data(), step, k,
                                                      static_cast<float*>(pd) + r * k);
      } else {
        float *g = wide.at<float>(0) + 2 * i * k, *row = g + k;
        kernels.widen(static_cast<const uint16_t*>(pg) + r * k, k, g);
        kernels.widen(static_cast<const uint16_t*>(px) + r * k, k, row);
        sum[r] = kernels.fake_quantize_split.backward(g, row, rows.limit.data(), step, k, g);
        kernels.narrow(g, k, static_cast<uint16_t*>(pd) + r * k);
      }
    }
  });
  if (rows.shared_scale) {
    double total = 0.0;
    for (int64_t r = 0; r < rows.n; ++r) total += sum[r];
    *out = static_cast<float>(total);
  } else {
    std::copy_n(sum, rows.n, out);
  }
  return {dx, dscale};
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("fake_quantize_split", TORCH_BOX(&fake_quantize_split));
  m.impl("fake_quantize_split_backward", TORCH_BOX(&fake_quantize_split_backward));
}

}  // namespace
}  // namespace ocsquant
