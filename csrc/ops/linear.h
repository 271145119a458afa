// What the linear operators share: checks, memory, threads.
#pragma once
#include <optional>

#include "check.h"

namespace ocsquant {

struct LinearOperands {
  const Tensor &x, &packed, &scale;
  const std::optional<Tensor>&bias, &tail_index, &input_inverse, &input_shift;
  int64_t group_size = 0;  // 0: one scale per output
};

TokenQuantizer check_quantizer(const char* op, int64_t bits, int64_t max_outliers, double threshold);
Tensor linear(const char* op, const LinearOperands& operands, TokenQuantizer how);

}  // namespace ocsquant
