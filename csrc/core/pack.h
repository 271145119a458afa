// The P8 layout: [ceil(n/64)] panels of [k/4 groups of the weight][tail/4 groups of the split channels][1 group of
// sums], every group 64 columns x 4 channels of int8, columns outermost. One 64-byte vector holds 16 columns x 4
// channels, so the same bytes serve 128-, 256- and 512-bit kernels. The last group holds 64 int32: the sum of each
// column's codes.
#pragma once
#include <cstdint>

#include "kernels.h"

namespace ocsquant {

inline int64_t groups_of(int64_t channels) { return (channels + kGroup - 1) / kGroup; }

// codes [n][k] and tail [n][e] (or null) to packed; padding is zero.
void pack_panels(const int8_t* codes, const int8_t* tail, int64_t n, int64_t k, int64_t e, int8_t* packed);
void unpack_panels(const int8_t* packed, int64_t n, int64_t k, int64_t e, int8_t* codes, int8_t* tail);

}  // namespace ocsquant
