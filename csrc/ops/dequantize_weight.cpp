#include <cstring>

#include "check.h"

namespace ocsquant {
namespace {

void check_bits(const char* op, int64_t bits) {
  OCSQ_CHECK(bits >= 2 && bits <= 8, op, ": bits must be 2..8, got ", bits);
}

Tensor pack_codes(const Tensor& codes, int64_t bits) {
  check_tensor("pack_codes", "codes", codes, ScalarType::Byte, 2);
  check_bits("pack_codes", bits);
  const Tensor source = dense(codes);
  const int64_t n = codes.size(0), k = codes.size(1);
  const uint8_t* values = source.const_data_ptr<uint8_t>();
  for (int64_t i = 0; i < n * k; ++i) {
    OCSQ_CHECK(values[i] >> bits == 0, "pack_codes: codes must be below 2^bits = ", 1 << bits, ", got ",
               static_cast<int>(values[i]));
  }
  const int64_t row_bytes = (k + kCodeBlock - 1) / kCodeBlock * bits;
  Tensor packed = empty_cpu({n, row_bytes}, ScalarType::Byte);
  uint8_t* out = packed.mutable_data_ptr<uint8_t>();
  for (int64_t i = 0; i < n; ++i) ocsquant::pack_codes(values + i * k, k, static_cast<int>(bits), out + i * row_bytes);
  return packed;
}

const char* const kOp = "dequantize_weight";

Tensor dequantize_weight(const Tensor& packed, const Tensor& scale, int64_t k, int64_t bits, int64_t group_size,
                         const std::optional<Tensor>& zero, const std::optional<Tensor>& levels,
                         const std::optional<Tensor>& rows) {
  check_tensor(kOp, "packed", packed, ScalarType::Byte, 2);
  check_tensor(kOp, "scale", scale, ScalarType::Float, 2);
  check_bits(kOp, bits);
  OCSQ_CHECK(group_size >= 1, kOp, ": group_size must be at least 1, got ", group_size);
  const int64_t n = packed.size(0);
  // Bounded first, so that nothing below overflows.
  OCSQ_CHECK(k >= 0 && k <= packed.size(1) * kCodeBlock, kOp, ": k must be a size that packed can hold, got ", k);
  CodedWeight w = {nullptr, n, k, static_cast<int>(bits), group_size, nullptr, nullptr, nullptr, 0, 0};
  OCSQ_CHECK(packed.size(1) == w.row_bytes(), kOp, ": packed must have ", w.row_bytes(), " bytes a row for k = ", k,
             " and bits = ", bits, ", got ", packed.size(1));
  const int64_t groups = k == 0 ? 0 : (k - 1) / group_size + 1;  // group_size may be near 2^63
  OCSQ_CHECK(scale.size(0) == n && scale.size(1) == groups, kOp, ": scale must be [", n, ", ", groups, "], got [",
             scale.size(0), ", ", scale.size(1), "]");
  if (k > 0 && group_size > k) w.group_size = k;
  const Tensor codes = dense(packed), steps = dense(scale);
  std::optional<Tensor> zeros, book, index;
  if (zero.has_value()) {
    check_tensor(kOp, "zero", *zero, ScalarType::Float, 2);
    OCSQ_CHECK(zero->size(0) == n && zero->size(1) == groups, kOp, ": zero must have the shape of scale, got [",
               zero->size(0), ", ", zero->size(1), "]");
    zeros = dense(*zero);
    w.zero = zeros->const_data_ptr<float>();
  }
  if (levels.has_value()) {
    check_tensor(kOp, "levels", *levels, ScalarType::Char, 2);
    OCSQ_CHECK(!zero.has_value(), kOp, ": zero must be None where levels are given");
    OCSQ_CHECK(bits <= kMaxLevelBits, kOp, ": bits must be 2..", kMaxLevelBits, " where levels are given, got ", bits);
    w.books = levels->size(0);
    w.entries = levels->size(1);
    OCSQ_CHECK((w.books == 1 || w.books == n) && w.entries >= 1 && w.entries <= (1 << bits), kOp,
               ": levels must be [1 or ", n, ", 1..", 1 << bits, "], got [", w.books, ", ", w.entries, "]");
    book = dense(*levels);
    w.levels = book->const_data_ptr<int8_t>();
  }
  int64_t count = n;
  const int64_t* wanted = nullptr;
  if (rows.has_value()) {
    check_tensor(kOp, "rows", *rows, ScalarType::Long, 1);
    index = dense(*rows);
    wanted = index->const_data_ptr<int64_t>();
    count = rows->size(0);
    for (int64_t i = 0; i < count; ++i) {
      OCSQ_CHECK(wanted[i] >= 0 && wanted[i] < n, kOp, ": rows must be in 0..", n - 1, ", got ", wanted[i]);
    }
  }
  w.packed = codes.const_data_ptr<uint8_t>();
  w.scale = steps.const_data_ptr<float>();
  Tensor y = empty_cpu({count, k}, ScalarType::Float);
  float* out = y.mutable_data_ptr<float>();
  const Kernels& kernels = cpu_kernels();
  constexpr int64_t kWork = 1 << 15;  // weights worth a thread's start
  parallel_chunks(count, count * k < kWork ? 1 : count * k / kWork, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) kernels.dequantize_row(w, wanted ? wanted[i] : i, out + i * k);
  });
  return y;
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CPU, m) {
  m.impl("pack_codes", TORCH_BOX(&pack_codes));
  m.impl("dequantize_weight", TORCH_BOX(&dequantize_weight));
}

}  // namespace
}  // namespace ocsquant
