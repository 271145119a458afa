// A linear whose weight has taken over per-channel scales of its input: the prologue divides by them and shifts.
#include "linear.h"

namespace ocsquant {
namespace {

Tensor channels(const char* op, const char* name, const Tensor& t, const Tensor& x) {
  check_float(op, "x", x);
  OCSQ_CHECK(x.dim() >= 1, op, ": x must have at least one dimension, got a scalar");
  check_vector(op, name, t, ScalarType::Float, x.size(-1), "column of x");
  return dense(t);
}

Tensor scale_folded_linear_nonlinear(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                     const Tensor& input_inverse, const std::optional<Tensor>& input_shift,
                                     const std::optional<Tensor>& bias, const std::optional<Tensor>& tail_index,
                                     int64_t bits, bool dynamic, int64_t max_outliers, double threshold, bool symmetric,
                                     int64_t weight_bits, const std::optional<Tensor>& zero,
                                     const std::optional<Tensor>& levels, const std::string& nonlinearity) {
  constexpr const char* kOp = "scale_folded_linear";
  TokenQuantizer how = check_quantizer(kOp, bits, max_outliers, threshold);
  how.fixed = !dynamic;
  how.symmetric = symmetric;
  OCSQ_CHECK(symmetric || (!dynamic && max_outliers == 0), kOp,
             ": symmetric must be True where dynamic is True or max_outliers is above 0");
  const Tensor inverse = channels(kOp, "input_inverse", input_inverse, x);
  how.inverse = inverse.const_data_ptr<float>();
  std::optional<Tensor> shift;
  if (input_shift.has_value()) {
    shift = channels(kOp, "input_shift", *input_shift, x);
    how.shift = shift->const_data_ptr<float>();
  }
  return linear(
      kOp, x,
      {packed, scale, bias, tail_index, Storage{weight_bits, zero, levels}, check_nonlinearity(kOp, nonlinearity)},
      how);
}

Tensor scale_folded_linear_train(const Tensor& x, const Tensor& packed, const Tensor& scale,
                                 const Tensor& input_inverse, const std::optional<Tensor>& input_shift,
                                 const std::optional<Tensor>& bias, const std::optional<Tensor>& tail_index,
                                 int64_t bits, bool dynamic, int64_t max_outliers, double threshold, bool symmetric,
                                 int64_t weight_bits, const std::optional<Tensor>& zero,
                                 const std::optional<Tensor>& levels) {
  return scale_folded_linear_nonlinear(x, packed, scale, input_inverse, input_shift, bias, tail_index, bits, dynamic,
                                       max_outliers, threshold, symmetric, weight_bits, zero, levels, "none");
}

Tensor scale_folded_linear(const Tensor& x, const Tensor& packed, const Tensor& scale, const Tensor& input_inverse,
                           const std::optional<Tensor>& input_shift, const std::optional<Tensor>& bias,
                           const std::optional<Tensor>& tail_index, int64_t bits, int64_t max_outliers,
                           bool symmetric) {
  const std::optional<Tensor> none;
  return scale_folded_linear_train(x, packed, scale, input_inverse, input_shift, bias, tail_index, bits, false,
                                   max_outliers, kMinOutlierThreshold, symmetric, 8, none, none);
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("scale_folded_linear", TORCH_BOX(&scale_folded_linear));
  m.impl("scale_folded_linear_nonlinear", TORCH_BOX(&scale_folded_linear_nonlinear));
  m.impl("scale_folded_linear_train", TORCH_BOX(&scale_folded_linear_train));
}

}  // namespace
}  // namespace ocsquant
