// The layout of a packed weight: [ceil(n/64)] panels of [groups of the weight][groups of the split channels][bounds]. A
// group is 64 columns x 4 channels, columns outermost, each byte code + 128. One 64-byte vector holds 16 columns x 4
// channels, so the same bytes serve 128-, 256- and 512-bit kernels.
//
// Below 8 bits a span of 4 groups, 1024 codes of no sign, lies in planes: of 4 bits, with groups 0 and 1 in the low
// halves of its bytes and 2 and 3 in the high ones; of 2 bits, each group two bits further up. 6 bits are the one
// plane, then the other, of their upper bits. The weight is filled up to a whole span, the split channels stay bytes.
//
// The bounds are a byte for every span of 4 groups: at least half the Euclidean norm of the codes that any 16-bit lane
// of that span holds (a column's channels 0 and 1 of each group, or its channels 2 and 3). By Cauchy and Schwarz they
// tell a kernel that a lane's sum of products fits.
#pragma once
#include <cmath>
#include <cstdint>

#include "kernels.h"

namespace ocsquant {

inline int64_t groups_of(int64_t channels) { return (channels + kGroup - 1) / kGroup; }

// Half a norm of `squares`, rounded up: below 256, as 8 codes of -128 have a norm of 362.1.
inline uint8_t half_norm(int32_t squares) {
  return static_cast<uint8_t>(std::sqrt(static_cast<float>(squares)) * 0.5f + 0.9999f);
}
// Norms that multiply to less than 2^15. Half norms are at most 180 (bodies within +-127) and 182 (codes of -128), so
// that their own product fits int16 too.
constexpr int kMaxHalfNorms = 8191;
static_assert(180 * 182 < 1 << 15);

// codes [n][k], what the products are made of, and tail [n][e] (or null) to packed; padding holds 0. Returns the index
// of the first code that `shape` cannot express, -1 if there is none.
int64_t pack_panels(const int8_t* codes, const int8_t* tail, const PackedWeight& shape, uint8_t* packed);
void unpack_panels(const PackedWeight& weight, int8_t* codes, int8_t* tail);

}  // namespace ocsquant
