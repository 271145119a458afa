// y = nonlinearity(x), as the epilogue of the linear layers computes it.
#include <algorithm>
#include <cstring>

#include "linear.h"

namespace ocsquant {
namespace {

constexpr int64_t kChunk = 2048, kSerialValues = 32'768;

// run(first, last) over the chunks of n values.
template <class Run>
void over_chunks(int64_t n, const Run& run) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  n > kSerialValues ? torch::stable::parallel_for(0, chunks, 1, run) : run(0, chunks);
}

}  // namespace

void finish_outputs(float* y, const float* others, int64_t n, Nonlinearity which) {
  const Kernels& kernels = cpu_kernels();
  over_chunks(n, [&](int64_t first, int64_t last) {
    alignas(64) float block[kChunk];
    for (int64_t at = first * kChunk; at < std::min(n, last * kChunk); at += kChunk) {
      const int64_t count = std::min(kChunk, n - at);
      for (int64_t i = 0; i < count; ++i) block[i] = y[at + i] + others[at + i];
      kernels.nonlinear(which, count, block);
      std::memcpy(y + at, block, count * sizeof(float));
    }
  });
}

namespace {

Tensor nonlinear(const Tensor& x, const std::string& nonlinearity) {
  constexpr const char* kOp = "nonlinear";
  const Float dtype = check_float(kOp, "x", x);
  const Nonlinearity which = check_nonlinearity(kOp, nonlinearity);
  const Tensor from = dense(x);
  Tensor y = empty_cpu(sizes_of(x), x.scalar_type());
  const Kernels& kernels = cpu_kernels();
  const void* in = from.const_data_ptr();
  void* out = y.mutable_data_ptr();
  const int64_t n = x.numel();
  over_chunks(n, [&](int64_t first, int64_t last) {
    alignas(64) float block[kChunk];
    for (int64_t at = first * kChunk; at < std::min(n, last * kChunk); at += kChunk) {
      const int64_t count = std::min(kChunk, n - at);
      if (dtype == Float::f32) {
        std::memcpy(block, static_cast<const float*>(in) + at, count * sizeof(float));
      } else {
        kernels.widen(static_cast<const uint16_t*>(in) + at, count, block);
      }
      kernels.nonlinear(which, count, block);
      if (dtype == Float::f32) {
        std::memcpy(static_cast<float*>(out) + at, block, count * sizeof(float));
      } else {
        kernels.narrow(block, count, static_cast<uint16_t*>(out) + at);
      }
    }
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) { m.impl("nonlinear", TORCH_BOX(&nonlinear)); }

}  // namespace
}  // namespace ocsquant
