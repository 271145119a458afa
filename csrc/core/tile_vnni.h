// Rows of int8 codes, for kernels that multiply unsigned weights by signed activations: a code becomes a body that a
// byte holds and, where that is not all of it, a rest. Included inside a target region, after
//   Narrow::operator()(codes, count, out)   up to 32 codes to as many bodies, zeros to the 32nd; a bit for every code
//                                           that has a rest; bodies and rests join Narrow::sum()
#pragma once

namespace ocsquant {
namespace {

// An odd number of cache lines, so that the rows of a tile do not share the places of a cache.
inline int64_t int8_row_bytes(int64_t depth) { return ((depth + 63) / 64 | 1) * 64; }

// Where the rows of a tile stand.
struct CodeRows {
  const uint8_t* first;
  int64_t pitch;
  OCSQ_INLINE CodeRows from_group(int64_t g) const { return {first + g * kGroup, pitch}; }
  OCSQ_INLINE int32_t quad(int row) const {
    int32_t codes;
    std::memcpy(&codes, first + row * pitch, sizeof(codes));
    return codes;
  }
};

OCSQ_INLINE int32_t collect_rests(uint32_t beyond, const int16_t* codes, int64_t k, Rest* rests, int32_t count) {
  for (; beyond != 0; beyond &= beyond - 1) {
    const int i = __builtin_ctz(beyond), code = codes[i];
    rests[count++] = {static_cast<int32_t>(k + i), code > 0 ? code - 127 : code + 128};
  }
  return count;
}

inline void place_int8(int16_t* codes, int64_t pitch, int64_t depth, const TileRows& out) {
  uint8_t* to = out.tile;
  for (int i = 0; i < out.rows; ++i, codes += pitch, to += int8_row_bytes(depth)) {
    Rest* rests = out.rests + i * out.rest_capacity;
    Narrow narrow;
    int32_t count = 0;
    int64_t k = 0;
    for (; k + 32 <= depth; k += 32) {
      const uint32_t beyond = narrow(codes + k, 32, to + k);
      if (beyond != 0) count = collect_rests(beyond, codes + k, k, rests, count);
    }
    if (k < depth)
      count = collect_rests(narrow(codes + k, static_cast<int>(depth - k), to + k), codes + k, k, rests, count);
    out.offset_codes[i] = narrow.sum();
    out.rest_count[i] = count;
  }
}

// An outlier has one rest for its column and one for its tail column.
constexpr int64_t outlier_rests(int64_t, int max_outliers) { return 2 * static_cast<int64_t>(max_outliers); }

// Moves the byte of channel k of every column (vpshufb) to where a 32-bit lane has its lower half, alone: times a rest
// in 16 bits, however large.
alignas(64) constexpr uint8_t kPicks[kGroup][16] = {
    {0, 128, 128, 128, 4, 128, 128, 128, 8, 128, 128, 128, 12, 128, 128, 128},
    {1, 128, 128, 128, 5, 128, 128, 128, 9, 128, 128, 128, 13, 128, 128, 128},
    {2, 128, 128, 128, 6, 128, 128, 128, 10, 128, 128, 128, 14, 128, 128, 128},
    {3, 128, 128, 128, 7, 128, 128, 128, 11, 128, 128, 128, 15, 128, 128, 128}};

}  // namespace
}  // namespace ocsquant
