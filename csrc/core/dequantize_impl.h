// Rows of b-bit codes to floats, written once for all instruction sets. Included inside a target region.
#pragma once

namespace ocsquant {
namespace {

constexpr int64_t kChunk = 512;  // codes unpacked at a time, a multiple of kCodeBlock

// Eight codes side by side in the lowest Bits bytes become one in each byte, halving the distance three times.
template <int Bits>
OCSQ_INLINE uint64_t spread(uint64_t w) {
  constexpr uint64_t one = (uint64_t{1} << Bits) - 1;
  constexpr uint64_t two = (uint64_t{1} << 2 * Bits) - 1, four = Bits == 8 ? 0xffffffff : (uint64_t{1} << 4 * Bits) - 1;
  w = (w & four) | (w >> 4 * Bits & four) << 32;
  constexpr uint64_t pairs = two | two << 32;
  w = (w & pairs) | (w >> 2 * Bits & pairs) << 16;
  constexpr uint64_t ones = one | one << 16 | one << 32 | one << 48;
  return (w & ones) | (w >> Bits & ones) << 8;
}

template <int Bits>
inline void unpack_codes(const uint8_t* p, int64_t count, uint8_t* codes) {
  const int64_t blocks = (count + kCodeBlock - 1) / kCodeBlock;
  for (int64_t i = 0; i < blocks; ++i, p += Bits, codes += kCodeBlock) {
    uint64_t word = 0;
    if ((blocks - i) * Bits >= static_cast<int64_t>(sizeof word)) {
      std::memcpy(&word, p, sizeof word);  // one load, where three or seven bytes would be two or three
    } else {
      std::memcpy(&word, p, Bits);
    }
    const uint64_t eight = spread<Bits>(word);
    std::memcpy(codes, &eight, sizeof eight);
  }
}

inline void unpack_codes(int bits, const uint8_t* p, int64_t count, uint8_t* codes) {
  switch (bits) {
    case 2:
      return unpack_codes<2>(p, count, codes);
    case 3:
      return unpack_codes<3>(p, count, codes);
    case 4:
      return unpack_codes<4>(p, count, codes);
    case 5:
      return unpack_codes<5>(p, count, codes);
    case 6:
      return unpack_codes<6>(p, count, codes);
    case 7:
      return unpack_codes<7>(p, count, codes);
    default:
      return unpack_codes<8>(p, count, codes);
  }
}

inline void dequantize_row(const CodedWeight& w, int64_t row, float* y) {
  const uint8_t* packed = w.packed + row * w.row_bytes();
  const float* scale = w.scale + row * w.groups();
  const int8_t* levels = w.levels == nullptr ? nullptr : w.levels + (w.books == 1 ? 0 : row * w.entries);
  uint8_t codes[kChunk];
  float value[kMaxEntries] = {};
  int64_t filled = -1;  // the group that `value` was filled for
  for (int64_t first = 0; first < w.k; first += kChunk) {
    const int64_t last = w.k - first < kChunk ? w.k : first + kChunk;
    unpack_codes(w.bits, packed + first / kCodeBlock * w.bits, last - first, codes);
    for (int64_t begin = first; begin < last;) {
      const int64_t group = begin / w.group_size, edge = (group + 1) * w.group_size;
      const int64_t end = edge < last ? edge : last;
      const uint8_t* c = codes + (begin - first);
      const float s = scale[group];
      if (levels != nullptr) {
        if (filled != group) {
          for (int64_t i = 0; i < w.entries; ++i) value[i] = static_cast<float>(levels[i]) * s;
          filled = group;
        }
        for (int64_t j = begin; j < end; ++j) y[j] = value[c[j - begin]];
      } else {
        const float zero = w.zero == nullptr ? static_cast<float>(1 << (w.bits - 1)) : w.zero[row * w.groups() + group];
        for (int64_t j = begin; j < end; ++j) y[j] = (static_cast<float>(c[j - begin]) - zero) * s;
      }
      begin = end;
    }
  }
}

}  // namespace
}  // namespace ocsquant
