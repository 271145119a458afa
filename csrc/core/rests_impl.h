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
  static constexpr int kMaxRows = 32;  // of any Tile
  const Rest* of[kMaxRows];
  int32_t count[kMaxRows];
};

// Moves the byte of channel k of every column (vpshufb) to where a 32-bit lane has its lower half, alone: times a rest
// in 16 bits, however large.
alignas(64) constexpr uint8_t kPicks[kGroup][16] = {
    {0, 128, 128, 128, 4, 128, 128, 128, 8, 128, 128, 128, 12, 128, 128, 128},
    {1, 128, 128, 128, 5, 128, 128, 128, 9, 128, 128, 128, 13, 128, 128, 128},
    {2, 128, 128, 128, 6, 128, 128, 128, 10, 128, 128, 128, 14, 128, 128, 128},
    {3, 128, 128, 128, 7, 128, 128, 128, 11, 128, 128, 128, 15, 128, 128, 128}};

// Both halves of a Factor.
template <class Vec>
struct Picked {
  typename Vec::V pick, value;
  explicit OCSQ_INLINE Picked(const Rest& rest)
      : pick(Vec::repeat(kPicks[static_cast<uint32_t>(rest.k) % kGroup])), value(Simd::set1_i(rest.value)) {}
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
