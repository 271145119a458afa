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
#include "rowwise_impl.h"
//
#include "linear_impl.h"
#include "tile_int16.h"

namespace ocsquant {
namespace {

struct Tile {
  using Code = int16_t;
  static constexpr int kRows = 4;
  static constexpr bool kUnsigned = false;
  static constexpr int64_t kRowBlock = 64, kDepthBlock = 64, kDepthBlockFew = 64;

  static void place(int16_t* codes, int64_t pitch, int rows, int64_t depth, Code* out, Rest*, int32_t* counts,
                    int64_t) {
    place_int16(codes, pitch, rows, depth, out);
    for (int i = 0; i < rows; ++i) counts[i] = 0;
  }

  static void multiply(int rows, const Code* a, const Block& block, int32_t* sums) {
    if (block.first) std::memset(sums, 0, rows * kPanel * sizeof(int32_t));
    const int8_t* b = block.weights;
    for (int64_t g = 0; g < block.groups; ++g, b += kGroupBytes) {
      for (int i = 0; i < rows; ++i, a += kGroup) {
        int32_t* s = sums + i * kPanel;
        for (int64_t j = 0; j < block.width; ++j) {
          const int8_t* c = b + j * kGroup;
          s[j] += a[0] * c[0] + a[1] * c[1] + a[2] * c[2] + a[3] * c[3];
        }
      }
    }
  }
};

}  // namespace

const Kernels kScalar = {"scalar", linear_kernels<Tile>(), kFakeQuantize, widen, narrow};

}  // namespace ocsquant
