// What the linear operators share: checks, memory, threads.
#pragma once
#include <string>

#include "packed.h"

namespace ocsquant {

struct WeightOperands {
  const Tensor &packed, &scale;
  const std::optional<Tensor>&bias, &tail_index;
  const Storage& storage;
  Nonlinearity nonlinearity = Nonlinearity::none;
};

// Checked operands, and what keeps their memory alive; k inputs of at most `limit` columns, tail included.
class LinearWeight {
 public:
  LinearWeight(const char* op, const WeightOperands& operands, int64_t k, int64_t limit = kMaxDepth);
  const PackedWeight& weight() const { return form_.weight; }

 private:
  PackedForm form_;
  Tensor packed_, scale_;
  std::optional<Tensor> bias_, index_;
};

void check_vector(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t size, const char* of);
Nonlinearity check_nonlinearity(const char* op, const std::string& name);
TokenQuantizer check_quantizer(const char* op, int64_t bits, int64_t max_outliers, double threshold);
// y[m][w.n] in the dtype of x[m][k].
struct Product {
  const PackedWeight& w;
  void* y;
};
// All of x[m][k], quantized once. What the weights are stored as must be the same for all, their columns and scales
// need not.
void run_linears(const void* x, Float dtype, int64_t m, const TokenQuantizer& how, const Product* products,
                 int64_t count);
inline void run_linear(const void* x, Float dtype, int64_t m, const TokenQuantizer& how, const PackedWeight& w,
                       void* y) {
  const Product product = {w, y};
  run_linears(x, dtype, m, how, &product, 1);
}
// Rows to multiply at a time, at most `limit`, in whole tiles: about as many each time and for each thread.
int64_t even_rows(int64_t rows, int64_t limit, int64_t tile, int64_t threads);
// y[n] = nonlinearity(y + others[n])
void finish_outputs(float* y, const float* others, int64_t n, Nonlinearity which);
int64_t tokens_of(const Tensor& x);               // rows of its last dimension
Tensor empty_output(const Tensor& x, int64_t n);  // of x with n columns, in its dtype
Tensor linear(const char* op, const Tensor& x, const WeightOperands& operands, const TokenQuantizer& how);

}  // namespace ocsquant
