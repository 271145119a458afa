// Plain C++: what the vector kernels are compared with, and what runs on a CPU without them.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "isa.h"
#include "kernels.h"
#include "simd_scalar.h"
//
#include "kernels_impl.h"
#include "tile_int16.h"

namespace ocsquant {
namespace {

struct Tile {
  static constexpr int kRows = 4;
  static constexpr int64_t kRowBlock = 64, kDepthBlock = 64, kDepthBlockFew = 64;

  static int64_t row_bytes(int64_t depth) { return depth * static_cast<int64_t>(sizeof(int16_t)); }
  static int64_t rest_capacity(int64_t, int) { return 0; }
  static void add_rests(const RestRows&, int, const StoredPanel&, int32_t*) {}
  static constexpr bool kFewGroups = false;
  using Out = RowOut;
  using Plane = CodesPlane;
  static Offset offset(const uint8_t*) { return Offset::none; }
  static bool unpacks(const uint8_t*, int64_t) { return false; }

  static void place(int16_t* codes, int64_t pitch, int64_t depth, const TileRows& out) {
    place_int16(codes, pitch, depth, out.rows, reinterpret_cast<int16_t*>(out.tile));
    for (int i = 0; i < out.rows; ++i) out.rest_count[i] = out.offset_codes[i] = 0;
  }

  static void multiply(int rows, const uint8_t* tile, int64_t, const Block& block, int32_t* sums) {
    if (block.first) std::memset(sums, 0, rows * kPanel * sizeof(int32_t));
    const int16_t* a = reinterpret_cast<const int16_t*>(tile) + block.first_group * kGroup * rows;
    const uint8_t* b = block.weights;
    const int offset = block.offset;
    for (int64_t g = 0; g < block.groups; ++g, b += kGroupBytes) {
      for (int i = 0; i < rows; ++i, a += kGroup) {
        int32_t* s = sums + i * kPanel;
        for (int64_t j = 0; j < block.width; ++j) {
          const uint8_t* c = b + j * kGroup;
          s[j] += a[0] * (c[0] - offset) + a[1] * (c[1] - offset) + a[2] * (c[2] - offset) + a[3] * (c[3] - offset);
        }
      }
    }
  }
};

}  // namespace

const Kernels kScalar = kernels<Tile>("scalar");

}  // namespace ocsquant
