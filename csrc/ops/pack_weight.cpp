#include <tuple>

#include "packed.h"

namespace ocsquant {
namespace {

Tensor pack_weight(const Tensor& codes, const std::optional<Tensor>& tail, int64_t bits,
                   const std::optional<Tensor>& zero, const std::optional<Tensor>& levels, int64_t group_size) {
  constexpr const char* kOp = "pack_weight";
  check_tensor(kOp, "codes", codes, ScalarType::Char, 2);
  const int64_t n = codes.size(0), k = codes.size(1);
  int64_t e = 0;
  std::optional<Tensor> extra;
  if (tail.has_value()) {
    check_tensor(kOp, "tail", *tail, ScalarType::Char, 2);
    OCSQ_CHECK(tail->size(0) == n, kOp, ": tail must have ", n, " rows, as codes has, got ", tail->size(0));
    e = tail->size(1);
    extra = dense(*tail);
  }
  OCSQ_CHECK(k + e <= kMaxDepth, kOp, ": codes and tail must have at most ", kMaxDepth,
             " columns together, the limit of exact int32 sums, got ", k + e);
  const PackedForm form(kOp, n, k, e, {bits, zero, levels, group_size});
  const Tensor dense_codes = dense(codes);
  Tensor packed = empty_cpu(form.sizes(), ScalarType::Byte);
  const int8_t* from = dense_codes.const_data_ptr<int8_t>();
  const int64_t bad = pack_panels(from, extra ? extra->const_data_ptr<int8_t>() : nullptr, form.weight,
                                  packed.mutable_data_ptr<uint8_t>());
  OCSQ_CHECK(bad < 0, kOp, ": codes must be ",
             levels.has_value() ? "entries of levels" : "what weight_bits and zero can hold", ", got ", int{from[bad]},
             " in row ", bad / k, ", column ", bad % k);
  return packed;
}

std::tuple<Tensor, Tensor> unpack_weight(const Tensor& packed, int64_t n, int64_t k, int64_t e, int64_t bits,
                                         const std::optional<Tensor>& zero, const std::optional<Tensor>& levels,
                                         int64_t group_size) {
  constexpr const char* kOp = "unpack_weight";
  check_tensor(kOp, "packed", packed, ScalarType::Byte, 4);
  OCSQ_CHECK(n >= 0 && k >= 0 && e >= 0 && k <= kMaxDepth && e <= kMaxDepth && k + e <= kMaxDepth &&
                 n <= packed.size(0) * kPanel,
             kOp, ": n, k and e must be sizes that packed can hold, got ", n, ", ", k, ", ", e);
  PackedForm form(kOp, n, k, e, {bits, zero, levels, group_size});
  form.check_sizes(kOp, packed);
  const Tensor source = dense(packed);
  form.weight.packed = source.const_data_ptr<uint8_t>();
  Tensor codes = empty_cpu({n, k}, ScalarType::Char), tail = empty_cpu({n, e}, ScalarType::Char);
  unpack_panels(form.weight, codes.mutable_data_ptr<int8_t>(), tail.mutable_data_ptr<int8_t>());
  return {codes, tail};
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("unpack_weight", TORCH_BOX(&unpack_weight));
}

}  // namespace
}  // namespace ocsquant
