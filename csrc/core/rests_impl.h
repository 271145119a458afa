// What the codes of outliers have beyond the bytes of a tile: added to its finished sums, a rest times the weights of
// its channel. Written once over vectors of bytes and
//   Factor(rest)                        what selects the channel among the bytes of a group and multiplies it
//   Factor::add(sums, bytes) -> sums    of as many columns as the bytes are groups of
// Included inside a target region, after unpack_impl.h.
#pragma once

namespace ocsquant {
namespace {

// The rests of a tile's rows, all of them or those of one group of scales.
struct RestRows {
  static constexpr int kMaxRows = 6;
  const Rest* of[kMaxRows];
  int32_t count[kMaxRows];
};

template <class Vec, class Factor>
struct RestSums {
  using V = typename Vec::V;
  static constexpr int kVectors = kGroupBytes / sizeof(V);

  template <class S>
  static __attribute__((noinline)) void run(const RestRows& rests, int rows, const StoredPanel& panel, int32_t* sums) {
    uint8_t* bytes = reinterpret_cast<uint8_t*>(sums);
    for (int i = 0; i < rows; ++i, bytes += kGroupBytes) {
      if (rests.count[i] == 0) continue;
      V c[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) c[v] = Vec::load(bytes + v * sizeof(V));
      for (const Rest *rest = rests.of[i], *end = rest + rests.count[i]; rest < end; ++rest) {
        const Factor factor(*rest);
        V weights[kVectors];
        panel.load<Vec, S>(static_cast<uint32_t>(rest->k) / kGroup, weights);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) c[v] = factor.add(c[v], weights[v]);
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) Vec::store(bytes + v * sizeof(V), c[v]);
    }
  }

  // sums[row][64] += each rest.value * (the bytes of its channel).
  static void add_rests(const RestRows& rests, int rows, const StoredPanel& panel, int32_t* sums) {
    run_stored<Vec, RestSums>(panel, rests, rows, panel, sums);
  }
};

}  // namespace
}  // namespace ocsquant
