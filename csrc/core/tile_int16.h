// Tiles of int16 codes, [depth/4][rows][4], for kernels that multiply 16-bit pairs: the code of an outlier needs no
// splitting there, the width of the operand holds body and rest together. Included inside a target region.
#pragma once

namespace ocsquant {
namespace {

// Rows of codes that are placed all together.
struct RowOut : CodesOut {
  OCSQ_INLINE RowOut(int16_t* all, int64_t pitch, const TileRows&, int row) : CodesOut{all + row * pitch} {}
  OCSQ_INLINE void expect(int64_t) {}
  OCSQ_INLINE void finish(int64_t) {}
};

inline void place_int16(const int16_t* codes, int64_t pitch, int64_t depth, int rows, int16_t* tile) {
  for (int64_t k = 0; k < depth; k += kGroup) {
    for (int i = 0; i < rows; ++i, tile += kGroup) std::memcpy(tile, codes + i * pitch + k, kGroup * sizeof(int16_t));
  }
}

}  // namespace
}  // namespace ocsquant
