// Cuts a panel into strips whose sums fit sixteen vector registers: R rows x V vectors of kColumns columns each.
// Included inside a target region. Tile provides strip<R, V, kFetch>(a, weights, next, block, sums); with kFetch it
// fetches what lies at `next`.
#pragma once

namespace ocsquant {
namespace {

template <class Tile, class Code, int kColumns>
struct Strips {
  // Kept out of line: inlined into its caller it spills the sums (GCC 12).
  template <int R, int V>
  static __attribute__((noinline)) void rows(const Code* a, const Block& block, int32_t* sums) {
    for (int64_t j = 0; j < block.width; j += kColumns * V) {
      const int8_t* weights = block.weights + j * kGroup;
      // Every strip fetches its share of the next block, so that the cache sees one ascending stream.
      const int8_t* next = block.weights + block.ahead + j * kGroup * block.groups;
      if (block.ahead > 0) {
        Tile::template strip<R, V, true>(a, weights, next, block, sums + j);
      } else {
        Tile::template strip<R, V, false>(a, weights, next, block, sums + j);
      }
    }
  }

  static void multiply(int count, const Code* a, const Block& block, int32_t* sums) {
    switch (count) {
      case 1:
        return rows<1, 8>(a, block, sums);
      case 2:
        return rows<2, 4>(a, block, sums);
      case 3:
        return rows<3, 4>(a, block, sums);
      case 4:
        return rows<4, 2>(a, block, sums);
      case 5:
        return rows<5, 2>(a, block, sums);
      default:
        return rows<6, 2>(a, block, sums);
    }
  }
};

}  // namespace
}  // namespace ocsquant
