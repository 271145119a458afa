// Cuts a panel into strips whose sums fit sixteen vector registers: R rows x V vectors of 8 columns each. Included
// inside a target region. Tile provides strip<R, V, S, kFetch>(a, weights, map, next, block, sums); with kFetch it
// fetches what lies at `next`.
#pragma once

namespace ocsquant {
namespace {

template <class Tile, class Rows, class Run>
struct Strips {
  // Kept out of line: inlined into its caller it spills the sums (GCC 12).
  template <int R, int V, class S>
  static __attribute__((noinline)) void rows(const Rows& a, const Run& block, int32_t* sums) {
    for (int64_t j = 0; j < block.width; j += 8 * V) {
      const uint8_t *weights = block.weights + j * kGroup, *map = block.map + (S::kPerColumn ? j * kGroup : 0);
      // Every strip fetches its share of the next block, so that the cache sees one ascending stream.
      const uint8_t* next = block.next + j * kGroup * block.groups;
      if (block.next != nullptr) {
        Tile::template strip<R, V, S, true>(a, weights, map, next, block, sums + j);
      } else {
        Tile::template strip<R, V, S, false>(a, weights, map, next, block, sums + j);
      }
    }
  }
};

}  // namespace
}  // namespace ocsquant
