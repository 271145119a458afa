#include "pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

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

// Byte `at` of whole groups as a plane of `bits` bits keeps it: in which byte, how far up.
struct Spot {
  int64_t byte;
  int shift;
};
Spot spot(int64_t at, int plane_bits, int bits, int64_t offset) {
  const int64_t span = at / (kSpan * kGroupBytes), i = at % (kSpan * kGroupBytes);
  const int64_t plane_bytes = kSpan * kGroupBytes * plane_bits / 8;
  return {span * kSpan * kGroupBytes * bits / 8 + offset + i % plane_bytes,
          static_cast<int>(i / plane_bytes) * plane_bits};
}
Spot low_spot(int64_t at, int bits) { return spot(at, std::min(bits, 4), bits, 0); }
Spot high_spot(int64_t at) { return spot(at, 2, 6, kSpan * kGroupBytes / 2); }

void store_number(uint8_t* panel, int bits, int64_t at, int number) {
  const Spot low = low_spot(at, bits), high = high_spot(at);
  panel[low.byte] |= static_cast<uint8_t>((bits == 6 ? number & 15 : number) << low.shift);
  if (bits == 6) panel[high.byte] |= static_cast<uint8_t>(number >> 4 << high.shift);
}

int number_at(const uint8_t* panel, int bits, int64_t at) {
  const Spot low = low_spot(at, bits), high = high_spot(at);
  const int mask = bits == 2 ? 3 : 15, number = panel[low.byte] >> low.shift & mask;
  return bits == 6 ? number | (panel[high.byte] >> high.shift & 3) << 4 : number;
}

// Between codes, what the products are made of, and the numbers of `bits` bits that stand for them.
class Numbers {
 public:
  explicit Numbers(const PackedWeight& w) : w_(w) {
    if (w.levels == nullptr) return;
    std::fill(index_, index_ + 256, -1);
    for (int i = (1 << w.bits) - 1; i >= 0; --i) index_[static_cast<uint8_t>(w.levels[i])] = i;
  }

  // -1 where there is none.
  int of(int64_t row, int64_t channel, int code) const {
    if (w_.levels != nullptr) return index_[static_cast<uint8_t>(code)];
    const int number = code + zero(row, channel);
    return number >= 0 && number < 1 << w_.bits ? number : -1;
  }

  int8_t code(int64_t row, int64_t channel, int number) const {
    return static_cast<int8_t>(w_.levels != nullptr ? w_.levels[number] : number - zero(row, channel));
  }

 private:
  int zero(int64_t row, int64_t channel) const {
    const int64_t group = w_.group_channels > 0 ? channel / w_.group_channels : 0;
    return w_.zero != nullptr ? w_.zero[group * w_.n + row] : 1 << (w_.bits - 1);
  }

  const PackedWeight& w_;
  int index_[256];
};

}  // namespace

int64_t pack_panels(const int8_t* codes, const int8_t* tail, const PackedWeight& shape, uint8_t* packed) {
  const int64_t k = shape.k, e = shape.tail, groups = shape.groups(), base = shape.base_groups();
  const Numbers numbers(shape);
  std::vector<uint8_t> bytes(groups * kGroupBytes);
  for (int64_t first = 0; first < shape.n; first += kPanel, packed += shape.panel_bytes()) {
    const int64_t width = std::min(kPanel, shape.n - first);
    std::fill(bytes.begin(), bytes.end(), static_cast<uint8_t>(kOffset));
    pack_block(codes + first * k, width, k, bytes.data());
    if (e > 0) pack_block(tail + first * e, width, e, bytes.data() + base * kGroupBytes);
    std::memset(packed, 0, shape.panel_bytes());
    uint8_t* bounds = packed + shape.code_blocks() * kGroupBytes;
    for (int64_t s = 0; s < shape.spans(); ++s) {
      bounds[s] = bound_of(bytes.data() + s * kSpan * kGroupBytes, std::min(kSpan, groups - s * kSpan));
    }
    if (shape.bits == 8) {
      std::copy(bytes.begin(), bytes.end(), packed);
      continue;
    }
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t c = 0; c < k; ++c) {
        const int number = numbers.of(first + j, c, bytes[place(j, c)] - kOffset);
        if (number < 0) return (first + j) * k + c;
        store_number(packed, shape.bits, place(j, c), number);
      }
    }
    std::copy(bytes.begin() + base * kGroupBytes, bytes.end(), packed + base * kGroupBytes * shape.bits / 8);
  }
  return -1;
}

void unpack_panels(const PackedWeight& weight, int8_t* codes, int8_t* tail) {
  const int64_t k = weight.k, e = weight.tail, base_blocks = weight.base_groups() * weight.bits / 8;
  const Numbers numbers(weight);
  const uint8_t* panel = weight.packed;
  for (int64_t first = 0; first < weight.n; first += kPanel, panel += weight.panel_bytes()) {
    const int64_t width = std::min(kPanel, weight.n - first);
    if (weight.bits == 8) unpack_block(panel, width, k, codes + first * k);
    for (int64_t j = 0; j < width && weight.bits < 8; ++j) {
      for (int64_t c = 0; c < k; ++c) {
        codes[(first + j) * k + c] = numbers.code(first + j, c, number_at(panel, weight.bits, place(j, c)));
      }
    }
    if (e > 0) unpack_block(panel + base_blocks * kGroupBytes, width, e, tail + first * e);
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
