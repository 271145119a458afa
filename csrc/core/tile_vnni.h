// Tiles of int8 codes, [depth/4][rows][4], for kernels that multiply unsigned weights by signed activations: a code
// becomes a body that a byte holds and, where that is not all of it, a rest. Included inside a target region, after
// Narrow:
//   bool Narrow::block(const int16_t* codes, int8_t* out)   32 codes to their bodies; true if any code has a rest
#pragma once

namespace ocsquant {
namespace {

OCSQ_INLINE int body_of(int code) { return code > 127 ? 127 : code < -128 ? -128 : code; }

inline int32_t collect_rests(const int16_t* codes, int64_t first, int64_t last, Rest* rests, int32_t count) {
  for (int64_t k = first; k < last; ++k) {
    const int rest = codes[k] - body_of(codes[k]);
    if (rest != 0) rests[count++] = {static_cast<int32_t>(k), rest};
  }
  return count;
}

// Narrows a row where it stands: block k is read before the bytes of block k are written, and those end before it.
inline int32_t narrow_row(int16_t* codes, int64_t depth, int8_t* out, Rest* rests) {
  constexpr int kBlock = 32;
  int32_t count = 0;
  int64_t k = 0;
  for (; k + kBlock <= depth; k += kBlock) {
    int8_t block[kBlock];
    if (Narrow::block(codes + k, block)) count = collect_rests(codes, k, k + kBlock, rests, count);
    std::memcpy(out + k, block, kBlock);
  }
  count = collect_rests(codes, k, depth, rests, count);
  for (; k < depth; ++k) out[k] = static_cast<int8_t>(body_of(codes[k]));
  return count;
}

inline void place_int8(int16_t* codes, int64_t pitch, int64_t depth, const TileRows& out) {
  for (int i = 0; i < out.rows; ++i) {
    int16_t* row = codes + i * pitch;
    out.offset_codes[i] = sum_of(row, depth);
    int8_t* bodies = out.rows == 1 ? reinterpret_cast<int8_t*>(out.tile) : reinterpret_cast<int8_t*>(row);
    out.rest_count[i] = narrow_row(row, depth, bodies, out.rests + i * out.rest_capacity);
  }
  if (out.rows == 1) return;
  uint8_t* tile = out.tile;
  for (int64_t k = 0; k < depth; k += kGroup) {
    for (int i = 0; i < out.rows; ++i, tile += kGroup) {
      std::memcpy(tile, reinterpret_cast<const uint8_t*>(codes + i * pitch) + k, kGroup);
    }
  }
}

// An outlier has one rest for its column and one for its tail column.
constexpr int64_t outlier_rests(int64_t, int max_outliers) { return 2 * static_cast<int64_t>(max_outliers); }

}  // namespace
}  // namespace ocsquant
