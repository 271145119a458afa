#include <tuple>

#include "check.h"
#include "core/pack.h"

namespace ocsquant {
namespace {

Tensor pack_weight(const Tensor& codes, const std::optional<Tensor>& tail) {
  check_tensor("pack_weight", "codes", codes, ScalarType::Char, 2);
  const int64_t n = codes.size(0), k = codes.size(1);
  int64_t e = 0;
  std::optional<Tensor> extra;
  if (tail.has_value()) {
    check_tensor("pack_weight", "tail", *tail, ScalarType::Char, 2);
    OCSQ_CHECK(tail->size(0) == n, "pack_weight: tail must have ", n, " rows, as codes has, got ", tail->size(0));
    e = tail->size(1);
    extra = dense(*tail);
  }
  OCSQ_CHECK(k + e <= kMaxDepth, "pack_weight: codes and tail must have at most ", kMaxDepth,
             " columns together, the limit of exact int32 sums, got ", k + e);
  const Tensor dense_codes = dense(codes);
  const PackedWeight shape = {nullptr, n, k, e, nullptr, nullptr, nullptr};
  Tensor packed = empty_cpu({shape.panels(), shape.groups() + shape.bound_blocks(), kPanel, kGroup}, ScalarType::Byte);
  pack_panels(dense_codes.const_data_ptr<int8_t>(), extra ? extra->const_data_ptr<int8_t>() : nullptr, shape,
              packed.mutable_data_ptr<uint8_t>());
  return packed;
}

std::tuple<Tensor, Tensor> unpack_weight(const Tensor& packed, int64_t n, int64_t k, int64_t e) {
  check_tensor("unpack_weight", "packed", packed, ScalarType::Byte, 4);
  OCSQ_CHECK(n >= 0 && k >= 0 && e >= 0 && k <= kMaxDepth && e <= kMaxDepth && k + e <= kMaxDepth &&
                 n <= packed.size(0) * kPanel,
             "unpack_weight: n, k and e must be sizes that packed can hold, got ", n, ", ", k, ", ", e);
  const Tensor source = dense(packed);
  const PackedWeight weight = {source.const_data_ptr<uint8_t>(), n, k, e, nullptr, nullptr, nullptr};
  const int64_t blocks = weight.groups() + weight.bound_blocks();
  OCSQ_CHECK(packed.size(0) == weight.panels() && packed.size(1) == blocks && packed.size(2) == kPanel &&
                 packed.size(3) == kGroup,
             "unpack_weight: packed must be [", weight.panels(), ", ", blocks, ", 64, 4] for n = ", n, ", k = ", k,
             ", e = ", e);
  Tensor codes = empty_cpu({n, k}, ScalarType::Char), tail = empty_cpu({n, e}, ScalarType::Char);
  unpack_panels(weight, codes.mutable_data_ptr<int8_t>(), tail.mutable_data_ptr<int8_t>());
  return {codes, tail};
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
}

}  // namespace
}  // namespace ocsquant
