// Several linear layers of one input, which is quantized once.
#include <deque>

#include "linear.h"

namespace ocsquant {
namespace {

using OptionalTensors = std::vector<std::optional<Tensor>>;

std::vector<Tensor> quantized_linears(const Tensor& x, std::vector<Tensor> packed, std::vector<Tensor> scale,
                                      OptionalTensors bias, int64_t bits, int64_t max_outliers, double threshold,
                                      int64_t group_size, int64_t weight_bits, OptionalTensors zero,
                                      OptionalTensors levels, std::vector<std::string> nonlinearity) {
  constexpr const char* kOp = "quantized_linears";
  const Float dtype = check_float(kOp, "x", x);
  OCSQ_CHECK(x.dim() >= 1, kOp, ": x must have at least one dimension, got a scalar");
  const TokenQuantizer how = check_quantizer(kOp, bits, max_outliers, threshold);
  const size_t count = packed.size();
  OCSQ_CHECK(count > 0, kOp, ": packed must hold at least one weight, got none");
  const auto one_each = [&](const char* name, size_t size) {
    OCSQ_CHECK(size == count, kOp, ": ", name, " must have ", count, " entries, one per weight, got ", size);
  };
  one_each("scale", scale.size());
  one_each("bias", bias.size());
  one_each("zero", zero.size());
  one_each("levels", levels.size());
  one_each("nonlinearity", nonlinearity.size());
  const std::optional<Tensor> no_tail;
  std::deque<LinearWeight> weights;  // they do not move
  std::vector<Tensor> outputs;
  std::vector<Product> products;
  for (size_t i = 0; i < count; ++i) {
    const Storage storage = {weight_bits, zero[i], levels[i], group_size};
    const WeightOperands operands = {packed[i], scale[i], bias[i],
                                     no_tail,   storage,  check_nonlinearity(kOp, nonlinearity[i])};
    const PackedWeight& w = weights.emplace_back(kOp, operands, x.size(-1)).weight();
    OCSQ_CHECK(zero[i].has_value() == zero[0].has_value(), kOp, ": zero must be there for all weights or for none");
    OCSQ_CHECK(levels[i].has_value() == levels[0].has_value(), kOp,
               ": levels must be there for all weights or for none");
    outputs.push_back(empty_output(x, w.n));
    if (w.n > 0) products.push_back({w, outputs.back().mutable_data_ptr()});
  }
  const int64_t m = tokens_of(x);
  if (m > 0 && !products.empty()) {
    run_linears(dense(x).const_data_ptr(), dtype, m, how, products.data(), static_cast<int64_t>(products.size()));
  }
  return outputs;
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) { m.impl("quantized_linears", TORCH_BOX(&quantized_linears)); }

}  // namespace
}  // namespace ocsquant
