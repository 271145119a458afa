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
  Tensor packed =
      empty_cpu({(n + kPanel - 1) / kPanel, groups_of(k) + groups_of(e) + 1, kPanel, kGroup}, ScalarType::Char);
  pack_panels(dense_codes.const_data_ptr<int8_t>(), extra ? extra->const_data_ptr<int8_t>() : nullptr, n, k, e,
              packed.mutable_data_ptr<int8_t>());
  return packed;
}

std::tuple<Tensor, Tensor> unpack_weight(const Tensor& packed, int64_t n, int64_t k, int64_t e) {
  check_tensor("unpack_weight", "packed", packed, ScalarType::Char, 4);
  OCSQ_CHECK(n >= 0 && k >= 0 && e >= 0 && k <= kMaxDepth && e <= kMaxDepth && k + e <= kMaxDepth &&
                 n <= packed.size(0) * kPanel,
             "unpack_weight: n, k and e must be sizes that packed can hold, got ", n, ", ", k, ", ", e);
  OCSQ_CHECK(packed.size(0) == (n + kPanel - 1) / kPanel && packed.size(1) == groups_of(k) + groups_of(e) + 1 &&
                 packed.size(2) == kPanel && packed.size(3) == kGroup,
             "unpack_weight: packed must be [", (n + kPanel - 1) / kPanel, ", ", groups_of(k) + groups_of(e) + 1,
             ", 64, 4] for n = ", n, ", k = ", k, ", e = ", e);
  const Tensor source = dense(packed);
  Tensor codes = empty_cpu({n, k}, ScalarType::Char), tail = empty_cpu({n, e}, ScalarType::Char);
  unpack_panels(source.const_data_ptr<int8_t>(), n, k, e, codes.mutable_data_ptr<int8_t>(),
                tail.mutable_data_ptr<int8_t>());
  return {codes, tail};
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
}

}  // namespace
}  // namespace ocsquant
