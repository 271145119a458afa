// Quantize and dequantize activations between two learned clips; straight-through gradients, of the clips too.
#include <algorithm>
#include <tuple>

#include "check.h"

namespace ocsquant {
namespace {

// One block's partial sums are float32, the sum over blocks is float64; the same blocks for any number of threads.
constexpr int64_t kBlock = 4096;
constexpr int64_t kSerialBlocks = 16;

float clip_value(const char* op, const char* name, const Tensor& t) {
  const Float dtype = check_float(op, name, t);
  OCSQ_CHECK(t.numel() == 1, op, ": ", name, " must have one entry, got ", t.numel());
  if (dtype == Float::f32) return *t.const_data_ptr<float>();
  float value;
  cpu_kernels().widen(static_cast<const uint16_t*>(t.const_data_ptr()), 1, &value);
  return value;
}

ClipGrid check_grid(const char* op, const Tensor& low, const Tensor& high, int64_t bits, bool align_zero) {
  OCSQ_CHECK(bits >= 2 && bits <= 8, op, ": bits must be 2..8, got ", bits);
  const float lowest = clip_value(op, "clip_neg", low), highest = clip_value(op, "clip_pos", high);
  return clip_grid(lowest, highest, static_cast<int>(bits), align_zero);
}

int64_t chunks_for(int64_t blocks) {
  return blocks > kSerialBlocks ? std::min<int64_t>(blocks, torch::stable::get_num_threads()) : 1;
}

Tensor fake_quantize_clip(const Tensor& x, const Tensor& clip_neg, const Tensor& clip_pos, int64_t bits,
                          bool align_zero) {
  constexpr const char* kOp = "fake_quantize_clip";
  const Float dtype = check_float(kOp, "x", x);
  const ClipGrid grid = check_grid(kOp, clip_neg, clip_pos, bits, align_zero);
  const Tensor dense_x = dense(x);
  Tensor y = empty_cpu(sizes_of(x), x.scalar_type());
  const int64_t n = x.numel(), blocks = (n + kBlock - 1) / kBlock;
  const Kernels& kernels = cpu_kernels();
  const void* px = dense_x.const_data_ptr();
  void* py = y.mutable_data_ptr();
  parallel_chunks(blocks, chunks_for(blocks), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t at = b * kBlock, size = std::min(kBlock, n - at);
      if (dtype == Float::f32) {
        kernels.fake_quantize_clip.forward(static_cast<const float*>(px) + at, grid, size,
                                           static_cast<float*>(py) + at);
      } else {
        float wide[kBlock];
        kernels.widen(static_cast<const uint16_t*>(px) + at, size, wide);
        kernels.fake_quantize_clip.forward(wide, grid, size, wide);
        kernels.narrow(wide, size, static_cast<uint16_t*>(py) + at);
      }
    }
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> fake_quantize_clip_backward(const Tensor& grad, const Tensor& x,
                                                               const Tensor& clip_neg, const Tensor& clip_pos,
                                                               int64_t bits, bool align_zero) {
  constexpr const char* kOp = "fake_quantize_clip_backward";
  const Float dtype = check_float(kOp, "x", x);
  const ClipGrid grid = check_grid(kOp, clip_neg, clip_pos, bits, align_zero);
  OCSQ_CHECK(check_float(kOp, "grad", grad) == dtype && sizes_of(grad) == sizes_of(x), kOp,
             ": grad must have the shape and dtype of x");
  const Tensor dense_grad = dense(grad), dense_x = dense(x);
  Tensor dx = empty_cpu(sizes_of(x), x.scalar_type());
  Tensor dneg = empty_cpu(sizes_of(clip_neg), ScalarType::Float),
         dpos = empty_cpu(sizes_of(clip_pos), ScalarType::Float);
  const int64_t n = x.numel(), blocks = (n + kBlock - 1) / kBlock;
  const Kernels& kernels = cpu_kernels();
  const void *pg = dense_grad.const_data_ptr(), *px = dense_x.const_data_ptr();
  void* pd = dx.mutable_data_ptr();
  const Buffer buffer(blocks * sizeof(ClipSums));
  ClipSums* sums = buffer.at<ClipSums>(0);
  parallel_chunks(blocks, chunks_for(blocks), [&](int64_t, int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t at = b * kBlock, size = std::min(kBlock, n - at);
      if (dtype == Float::f32) {
        sums[b] =
            kernels.fake_quantize_clip.backward(static_cast<const float*>(pg) + at, static_cast<const float*>(px) + at,
                                                grid, size, static_cast<float*>(pd) + at);
      } else {
        float g[kBlock], wide[kBlock];
        kernels.widen(static_cast<const uint16_t*>(pg) + at, size, g);
        kernels.widen(static_cast<const uint16_t*>(px) + at, size, wide);
        sums[b] = kernels.fake_quantize_clip.backward(g, wide, grid, size, g);
        kernels.narrow(g, size, static_cast<uint16_t*>(pd) + at);
      }
    }
  });
  double below = 0.0, above = 0.0, inside = 0.0;
  for (int64_t b = 0; b < blocks; ++b) {
    below += sums[b].below;
    above += sums[b].above;
    inside += sums[b].inside;
  }
  inside /= static_cast<double>(grid.levels);
  *dneg.mutable_data_ptr<float>() = static_cast<float>(below + inside);
  *dpos.mutable_data_ptr<float>() = static_cast<float>(above - inside);
  return {dx, dneg, dpos};
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("fake_quantize_clip", TORCH_BOX(&fake_quantize_clip));
  m.impl("fake_quantize_clip_backward", TORCH_BOX(&fake_quantize_clip_backward));
}

}  // namespace
}  // namespace ocsquant
