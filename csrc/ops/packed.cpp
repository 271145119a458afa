#include "packed.h"

#include <algorithm>

namespace ocsquant {

void Storage::check(const char* op) const {
  OCSQ_CHECK(bits == 8 || bits == 6 || bits == 4 || bits == 2, op, ": weight_bits must be 8, 6, 4 or 2, got ", bits);
  OCSQ_CHECK(group_size >= 0 && group_size % (kSpan * kGroup) == 0, op, ": group_size must be 0 or a multiple of ",
             kSpan * kGroup, ", got ", group_size);
}

PackedForm::PackedForm(const char* op, int64_t n, int64_t k, int64_t e, const Storage& storage)
    : weight{nullptr, n, k, e, nullptr, nullptr, nullptr, storage.group_size, static_cast<int>(storage.bits)} {
  const int64_t bits = storage.bits;
  storage.check(op);
  OCSQ_CHECK(storage.group_size == 0 || k > 0, op, ": group_size must be 0 without columns, got ", storage.group_size);
  OCSQ_CHECK(storage.group_size == 0 || e == 0, op, ": tail must be absent where the scales have groups");
  if (storage.zero.has_value()) {
    check_tensor(op, "zero", *storage.zero, ScalarType::Byte, 2);
    OCSQ_CHECK(bits < 8, op, ": zero must be None where weight_bits is 8");
    OCSQ_CHECK(storage.zero->size(0) == weight.scale_groups() && storage.zero->size(1) == n, op, ": zero must be [",
               weight.scale_groups(), ", ", n, "], got [", storage.zero->size(0), ", ", storage.zero->size(1), "]");
    zero_ = dense(*storage.zero);
    weight.zero = zero_->const_data_ptr<uint8_t>();
    const uint8_t* end = weight.zero + zero_->numel();
    const uint8_t* bad = std::find_if(weight.zero, end, [&](uint8_t z) { return z >= 1 << bits; });
    OCSQ_CHECK(bad == end, op, ": zero must be below ", 1 << bits, ", got ", int{*bad});
  }
  if (storage.levels.has_value()) {
    check_tensor(op, "levels", *storage.levels, ScalarType::Char, 1);
    OCSQ_CHECK(bits < 8 && !storage.zero.has_value(), op,
               ": levels must be None where weight_bits is 8 or zero is given");
    const int64_t entries = storage.levels->numel();
    OCSQ_CHECK(entries >= 1 && entries <= 1 << bits, op, ": levels must have 1..", 1 << bits, " entries, got ",
               entries);
    const Tensor levels = dense(*storage.levels);
    const int8_t* from = levels.const_data_ptr<int8_t>();
    std::copy(from, from + entries, levels_);
    std::fill(levels_ + entries, levels_ + kMaxEntries, from[entries - 1]);
    weight.levels = levels_;
  }
}

void PackedForm::check_sizes(const char* op, const Tensor& packed) const {
  const int64_t panels = weight.panels(), blocks = weight.panel_blocks();
  OCSQ_CHECK(
      packed.size(0) == panels && packed.size(1) == blocks && packed.size(2) == kPanel && packed.size(3) == kGroup, op,
      ": packed must be [", panels, ", ", blocks, ", 64, 4] for n = ", weight.n, " outputs (scale), k = ", weight.k,
      " inputs (x), e = ", weight.tail, " tail columns and weight_bits = ", weight.bits, ", got [", packed.size(0),
      ", ", packed.size(1), ", ", packed.size(2), ", ", packed.size(3), "]");
}

}  // namespace ocsquant
