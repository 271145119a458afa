// How the codes of a packed weight are stored: what packing, unpacking and multiplying are all told.
#pragma once
#include <optional>

#include "check.h"
#include "core/pack.h"

namespace ocsquant {

struct Storage {
  int64_t bits = 8;
  const std::optional<Tensor>&zero, &levels;
  int64_t group_size = 0;  // 0: one scale per output

  void check(const char* op) const;
};

// A checked weight without its bytes, and the memory that it points to.
class PackedForm {
 public:
  PackedForm(const char* op, int64_t n, int64_t k, int64_t e, const Storage& storage);
  PackedForm(const PackedForm&) = delete;
  PackedForm& operator=(const PackedForm&) = delete;
  std::vector<int64_t> sizes() const { return {weight.panels(), weight.panel_blocks(), kPanel, kGroup}; }
  void check_sizes(const char* op, const Tensor& packed) const;

  PackedWeight weight;

 private:
  std::optional<Tensor> zero_;
  int8_t levels_[kMaxEntries];
};

}  // namespace ocsquant
