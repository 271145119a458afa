// Kurtosis of each row, its gradient, and a backward step that adds that gradient to the one that passes through.
#include <algorithm>
#include <cmath>

#include "check.h"

namespace ocsquant {
namespace {

constexpr int64_t kSerialValues = 65'536;

struct Rows {
  Float dtype;
  int64_t n, d;
};

Rows check_rows(const char* op, const Tensor& y) {
  const Float dtype = check_float(op, "y", y);
  OCSQ_CHECK(y.dim() >= 1, op, ": y must have at least one dimension, got a scalar");
  const int64_t d = y.size(-1);
  OCSQ_CHECK(d >= 1, op, ": y must have at least one column, got none");
  return {dtype, y.numel() / d, d};
}

int64_t chunks_for(const Rows& rows) {
  return rows.n * rows.d > kSerialValues ? std::min<int64_t>(rows.n, torch::stable::get_num_threads()) : 1;
}

const float* row_of(const Kernels& kernels, const Rows& rows, const void* base, int64_t r, float* wide) {
  if (rows.dtype == Float::f32) return static_cast<const float*>(base) + r * rows.d;
  kernels.widen(static_cast<const uint16_t*>(base) + r * rows.d, rows.d, wide);
  return wide;
}

std::vector<int64_t> leading_sizes(const Tensor& y) {
  std::vector<int64_t> sizes = sizes_of(y);
  sizes.pop_back();
  return sizes;
}

Tensor kurtosis(const Tensor& y) {
  const Rows rows = check_rows("kurtosis", y);
  const Tensor dense_y = dense(y);
  Tensor result = empty_cpu(leading_sizes(y), ScalarType::Float);
  const Kernels& kernels = cpu_kernels();
  const void* py = dense_y.const_data_ptr();
  float* out = result.mutable_data_ptr<float>();
  const int64_t chunks = chunks_for(rows);
  const Buffer wide(rows.dtype == Float::bf16 ? chunks * rows.d * sizeof(float) : 0);
  parallel_chunks(rows.n, chunks, [&](int64_t i, int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      out[r] = kernels.kurtosis.forward(row_of(kernels, rows, py, r, wide.at<float>(0) + i * rows.d), rows.d);
    }
  });
  return result;
}

// out = grad + factor(row) * dK/dy where K > target, else grad (null: 0); K of each row where `values` is given.
template <class Factor>
void add_gradient(const Rows& rows, const void* grad, const void* y, const Factor& factor, float target, void* out,
                  float* values) {
  const Kernels& kernels = cpu_kernels();
  const int64_t chunks = chunks_for(rows), d = rows.d;
  const Buffer wide(rows.dtype == Float::bf16 ? 2 * chunks * d * sizeof(float) : 0);
  parallel_chunks(rows.n, chunks, [&](int64_t i, int64_t first, int64_t last) {
    float *wide_y = wide.at<float>(0) + 2 * i * d, *wide_grad = wide_y + d;
    for (int64_t r = first; r < last; ++r) {
      const float* g = grad == nullptr ? nullptr : row_of(kernels, rows, grad, r, wide_grad);
      const float* row = row_of(kernels, rows, y, r, wide_y);
      float* to = rows.dtype == Float::f32 ? static_cast<float*>(out) + r * d : wide_grad;
      const float k = kernels.kurtosis.add_gradient(g, row, d, factor(r), target, to);
      if (values != nullptr) values[r] = k;
      if (rows.dtype == Float::bf16) kernels.narrow(to, d, static_cast<uint16_t*>(out) + r * d);
    }
  });
}

Tensor kurtosis_backward(const Tensor& grad, const Tensor& y) {
  constexpr const char* kOp = "kurtosis_backward";
  const Rows rows = check_rows(kOp, y);
  OCSQ_CHECK(check_float(kOp, "grad", grad) == Float::f32 && sizes_of(grad) == leading_sizes(y), kOp,
             ": grad must be float32 with one entry for each row of y");
  const Tensor dense_grad = dense(grad), dense_y = dense(y);
  Tensor dy = empty_cpu(sizes_of(y), y.scalar_type());
  const float* g = dense_grad.const_data_ptr<float>();
  const auto factor = [g](int64_t r) { return g[r]; };
  add_gradient(rows, nullptr, dense_y.const_data_ptr(), factor, -1.0f, dy.mutable_data_ptr(), nullptr);
  return dy;
}

Tensor kurtosis_inject(const Tensor& grad, const Tensor& y, const Tensor& scale, double weight, double target,
                       Tensor& log) {
  constexpr const char* kOp = "kurtosis_inject";
  const Rows rows = check_rows(kOp, y);
  OCSQ_CHECK(check_float(kOp, "grad", grad) == rows.dtype && sizes_of(grad) == sizes_of(y), kOp,
             ": grad must have the shape and dtype of y");
  check_tensor(kOp, "scale", scale, ScalarType::Float, 0);
  check_tensor(kOp, "log", log, ScalarType::Double, 1);
  OCSQ_CHECK(log.numel() == 3 && log.is_contiguous(), kOp,
             ": log must have 3 contiguous entries: the sum of K, rows, calls; got ", log.numel());
  const Tensor dense_grad = dense(grad), dense_y = dense(y);
  Tensor out = empty_cpu(sizes_of(y), y.scalar_type());
  if (rows.n == 0) return out;
  const float strength = *scale.const_data_ptr<float>();
  const float mean = static_cast<float>(strength * weight / static_cast<double>(rows.n));
  const Buffer values(rows.n * sizeof(float));
  float* k = values.at<float>(0);
  add_gradient(
      rows, dense_grad.const_data_ptr(), dense_y.const_data_ptr(), [mean](int64_t) { return mean; },
      static_cast<float>(target), out.mutable_data_ptr(), k);
  double* sums = log.mutable_data_ptr<double>();
  for (int64_t r = 0; r < rows.n; ++r) sums[0] += k[r];
  sums[1] += static_cast<double>(rows.n);
  sums[2] += 1.0;
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("kurtosis", TORCH_BOX(&kurtosis));
  m.impl("kurtosis_backward", TORCH_BOX(&kurtosis_backward));
  m.impl("kurtosis_inject", TORCH_BOX(&kurtosis_inject));
}

}  // namespace
}  // namespace ocsquant
