// What every op's glue needs: checks whose text is the whole message, dense views, allocation, the kernel table.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if __has_include(<sys/mman.h>)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "core/kernels.h"

namespace ocsquant {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// STD_TORCH_CHECK would put function, file and line in front of the text.
#define OCSQ_CHECK(condition, ...)                                                              \
  if (__builtin_expect(!(condition), 0)) {                                                      \
    throw std::runtime_error(torch::headeronly::detail::stdTorchCheckMsgImpl("", __VA_ARGS__)); \
  }

const Kernels& cpu_kernels();

// None reaches a kernel as an undefined tensor, another device through the dispatch key of a third argument.
inline void check_tensor(const char* op, const char* name, const Tensor& t, ScalarType dtype, int64_t dim) {
  OCSQ_CHECK(t.defined(), op, ": ", name, " must be a tensor, got None");
  OCSQ_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU, as the other arguments are");
  OCSQ_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ", torch::headeronly::toString(dtype), ", got ",
             torch::headeronly::toString(t.scalar_type()));
  OCSQ_CHECK(t.dim() == dim, op, ": ", name, " must have ", dim, " dimensions, got ", t.dim());
}

inline Float check_float(const char* op, const char* name, const Tensor& t) {
  OCSQ_CHECK(t.defined(), op, ": ", name, " must be a tensor, got None");
  OCSQ_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU, as the other arguments are");
  const ScalarType dtype = t.scalar_type();
  OCSQ_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16, op, ": ", name,
             " must be float32 or bfloat16, got ", torch::headeronly::toString(dtype));
  return dtype == ScalarType::Float ? Float::f32 : Float::bf16;
}

// Asking first is a quarter of the price of an unconditional contiguous(), a trip through the dispatcher.
inline Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

constexpr int64_t kHugePage = 2 << 20;

// Memory that large is fresh at every call: a fault for every 4 KB of it would cost more than filling it.
inline void want_huge_pages(void* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = 4096;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(memory), first = begin / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), begin + bytes - first, MADV_HUGEPAGE);
#endif
}

// The shim costs less than new_empty(), which goes through the dispatcher.
// order: the dimensions from the outermost in memory to the innermost; as they stand where it is empty.
inline Tensor empty_cpu(const std::vector<int64_t>& sizes, ScalarType dtype, const std::vector<int64_t>& order = {}) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    const size_t d = order.empty() ? i : static_cast<size_t>(order[i]);
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t code = 0;
  switch (dtype) {
    case ScalarType::Float:
      code = aoti_torch_dtype_float32();
      break;
    case ScalarType::BFloat16:
      code = aoti_torch_dtype_bfloat16();
      break;
    case ScalarType::Char:
      code = aoti_torch_dtype_int8();
      break;
    case ScalarType::Byte:
      code = aoti_torch_dtype_uint8();
      break;
    default:
      OCSQ_CHECK(false, "empty_cpu: no such dtype");
  }
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), code,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  Tensor made(handle);
  const int64_t bytes = made.numel() * static_cast<int64_t>(made.element_size());
  if (bytes >= kHugePage) want_huge_pages(made.mutable_data_ptr(), bytes);
  return made;
}

inline std::vector<int64_t> sizes_of(const Tensor& t) {
  std::vector<int64_t> sizes(t.dim());
  for (size_t d = 0; d < sizes.size(); ++d) sizes[d] = t.size(d);
  return sizes;
}

// Uninitialized bytes, freed with the scope; nothing inside parallel_for may allocate, since nothing there may throw.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) : bytes_(static_cast<uint8_t*>(std::malloc(bytes > 0 ? bytes : 1))) {
    if (bytes_ == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(bytes_); }
  template <class T>
  T* at(int64_t offset) const {
    return reinterpret_cast<T*>(bytes_ + offset);
  }

 private:
  uint8_t* bytes_;
};

inline int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Runs chunk(index, first, last) over [0, n) cut in `chunks` parts; each index may own a piece of a Buffer.
template <class Chunk>
void parallel_chunks(int64_t n, int64_t chunks, const Chunk& chunk) {
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t b, int64_t e) {
    for (int64_t i = b; i < e; ++i) chunk(i, n * i / chunks, n * (i + 1) / chunks);
  });
}

}  // namespace ocsquant
