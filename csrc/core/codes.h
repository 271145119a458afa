// Weights that are only stored in few bits: rows of b-bit codes, eight of them in b bytes, the first in the lowest
// bits.
#pragma once
#include <cstdint>

namespace ocsquant {

constexpr int64_t kCodeBlock = 8;
constexpr int64_t kMaxEntries = 64;
constexpr int kMaxLevelBits = 6;  // every code is then an index inside kMaxEntries

// value = (code - zero) * scale, or levels[code] * scale; without zero points a code is stored plus 2^(bits-1).
struct CodedWeight {
  const uint8_t* packed;  // [n][row_bytes]
  int64_t n, k;
  int bits;
  int64_t group_size;    // columns that share a scale
  const float* scale;    // [n][groups]
  const float* zero;     // the same, or null
  const int8_t* levels;  // [books][entries], or null
  int64_t books, entries;
  int64_t row_bytes() const { return (k + kCodeBlock - 1) / kCodeBlock * bits; }
  int64_t groups() const { return (k + group_size - 1) / group_size; }
};

// codes: k numbers below 2^bits, one row; packed: that row's bytes, zeros behind the last code.
void pack_codes(const uint8_t* codes, int64_t k, int bits, uint8_t* packed);

}  // namespace ocsquant
