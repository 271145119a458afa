#include "pack.h"

#include <algorithm>
#include <cstring>

namespace ocsquant {
namespace {

// One block of a panel: `channels` columns of the row-major matrix, `width` valid outputs.
void pack_block(const int8_t* codes, int64_t width, int64_t channels, int8_t* block, int32_t* sums) {
  for (int64_t j = 0; j < width; ++j) {
    const int8_t* row = codes + j * channels;
    for (int64_t c = 0; c < channels; ++c) {
      block[(c / kGroup) * kGroupBytes + j * kGroup + c % kGroup] = row[c];
      sums[j] += row[c];
    }
  }
}

void unpack_block(const int8_t* block, int64_t width, int64_t channels, int8_t* codes) {
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t c = 0; c < channels; ++c) {
      codes[j * channels + c] = block[(c / kGroup) * kGroupBytes + j * kGroup + c % kGroup];
    }
  }
}

}  // namespace

void pack_panels(const int8_t* codes, const int8_t* tail, int64_t n, int64_t k, int64_t e, int8_t* packed) {
  const int64_t base = groups_of(k) * kGroupBytes, extra = groups_of(e) * kGroupBytes;
  for (int64_t first = 0; first < n; first += kPanel, packed += base + extra + kGroupBytes) {
    const int64_t width = std::min(kPanel, n - first);
    std::memset(packed, 0, base + extra);
    int32_t sums[kPanel] = {};
    pack_block(codes + first * k, width, k, packed, sums);
    if (e > 0) pack_block(tail + first * e, width, e, packed + base, sums);
    std::memcpy(packed + base + extra, sums, sizeof(sums));
  }
}

void unpack_panels(const int8_t* packed, int64_t n, int64_t k, int64_t e, int8_t* codes, int8_t* tail) {
  const int64_t base = groups_of(k) * kGroupBytes, extra = groups_of(e) * kGroupBytes;
  for (int64_t first = 0; first < n; first += kPanel, packed += base + extra + kGroupBytes) {
    const int64_t width = std::min(kPanel, n - first);
    unpack_block(packed, width, k, codes + first * k);
    if (e > 0) unpack_block(packed + base, width, e, tail + first * e);
  }
}

}  // namespace ocsquant
