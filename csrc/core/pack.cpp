#include "pack.h"

#include <algorithm>
#include <cstring>

namespace ocsquant {
namespace {

// Where column j's channel c lies in a run of groups.
int64_t place(int64_t j, int64_t c) { return c / kGroup * kGroupBytes + j * kGroup + c % kGroup; }

void pack_block(const int8_t* codes, int64_t width, int64_t channels, uint8_t* block) {
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t c = 0; c < channels; ++c) {
      block[place(j, c)] = static_cast<uint8_t>(codes[j * channels + c] + kOffset);
    }
  }
}

void unpack_block(const uint8_t* block, int64_t width, int64_t channels, int8_t* codes) {
  for (int64_t j = 0; j < width; ++j) {
    for (int64_t c = 0; c < channels; ++c) {
      codes[j * channels + c] = static_cast<int8_t>(block[place(j, c)] - kOffset);
    }
  }
}

uint8_t bound_of(const uint8_t* span, int64_t groups) {
  int32_t largest = 0;
  for (int64_t lane = 0; lane < kGroupBytes; lane += 2) {
    int32_t squares = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const int first = span[g * kGroupBytes + lane] - kOffset, second = span[g * kGroupBytes + lane + 1] - kOffset;
      squares += first * first + second * second;
    }
    largest = std::max(largest, squares);
  }
  return half_norm(largest);
}

}  // namespace

void pack_panels(const int8_t* codes, const int8_t* tail, const PackedWeight& shape, uint8_t* packed) {
  const int64_t k = shape.k, e = shape.tail, groups = shape.groups();
  for (int64_t first = 0; first < shape.n; first += kPanel, packed += shape.panel_bytes()) {
    const int64_t width = std::min(kPanel, shape.n - first);
    std::memset(packed, kOffset, groups * kGroupBytes);
    pack_block(codes + first * k, width, k, packed);
    if (e > 0) pack_block(tail + first * e, width, e, packed + groups_of(k) * kGroupBytes);
    uint8_t* bounds = packed + groups * kGroupBytes;
    std::memset(bounds, 0, shape.bound_blocks() * kGroupBytes);
    for (int64_t s = 0; s < shape.spans(); ++s) {
      bounds[s] = bound_of(packed + s * kSpan * kGroupBytes, std::min(kSpan, groups - s * kSpan));
    }
  }
}

void unpack_panels(const PackedWeight& weight, int8_t* codes, int8_t* tail) {
  const int64_t k = weight.k, e = weight.tail;
  const uint8_t* panel = weight.packed;
  for (int64_t first = 0; first < weight.n; first += kPanel, panel += weight.panel_bytes()) {
    const int64_t width = std::min(kPanel, weight.n - first);
    unpack_block(panel, width, k, codes + first * k);
    if (e > 0) unpack_block(panel + groups_of(k) * kGroupBytes, width, e, tail + first * e);
  }
}

void pack_codes(const uint8_t* codes, int64_t k, int bits, uint8_t* packed) {
  for (int64_t j = 0; j < k; j += kCodeBlock, packed += bits) {
    uint64_t word = 0;
    for (int64_t i = 0; i < kCodeBlock && j + i < k; ++i) word |= static_cast<uint64_t>(codes[j + i]) << i * bits;
    std::memcpy(packed, &word, bits);
  }
}

}  // namespace ocsquant
