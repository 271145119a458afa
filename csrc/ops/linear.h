// What the linear operators share: checks, memory, threads.
#pragma once
#include "packed.h"

namespace ocsquant {

struct LinearOperands {
  const Tensor &x, &packed, &scale;
  const std::optional<Tensor>&bias, &tail_index, &input_inverse, &input_shift;
  const Storage& storage;
};

TokenQuantizer check_quantizer(const char* op, int64_t bits, int64_t max_outliers, double threshold);
Tensor linear(const char* op, const LinearOperands& operands, TokenQuantizer how);

}  // namespace ocsquant
