// Places codes for kernels that multiply unsigned activations by signed weights: a code becomes body + 128 in a byte,
// and what the body cannot hold becomes a rest. Included inside a target region, after Narrow:
//   bool Narrow::block(const int16_t* codes, uint8_t* out)   32 codes to body + 128; true if any code has a rest
#pragma once

namespace ocsquant {
namespace {

OCSQ_INLINE int body_of(int code) { return code > 127 ? 127 : code < -128 ? -128 : code; }

inline int32_t collect_rests(const int16_t* codes, int64_t first, int64_t last, Rest* rests, int32_t count) {
  for (int64_t k = first; k < last; ++k) {
    const int rest = codes[k] - body_of(codes[k]);
    if (rest != 0) rests[count++] = {static_cast<int32_t>(k), rest};
  }
  return count;
}

// Narrows a row where it stands: block k is read before the bytes of block k are written, and those end before it.
inline int32_t narrow_row(int16_t* codes, int64_t depth, uint8_t* out, Rest* rests) {
  constexpr int kBlock = 32;
  int32_t count = 0;
  int64_t k = 0;
  for (; k + kBlock <= depth; k += kBlock) {
    uint8_t block[kBlock];
    if (Narrow::block(codes + k, block)) count = collect_rests(codes, k, k + kBlock, rests, count);
    std::memcpy(out + k, block, kBlock);
  }
  count = collect_rests(codes, k, depth, rests, count);
  for (; k < depth; ++k) out[k] = static_cast<uint8_t>(body_of(codes[k]) + 128);
  return count;
}

inline void place_uint8(int16_t* codes, int64_t pitch, int rows, int64_t depth, uint8_t* out, Rest* rests,
                        int32_t* counts, int64_t capacity) {
  if (rows == 1) {
    counts[0] = narrow_row(codes, depth, out, rests);
    return;
  }
  for (int i = 0; i < rows; ++i) {
    int16_t* row = codes + i * pitch;
    counts[i] = narrow_row(row, depth, reinterpret_cast<uint8_t*>(row), rests + i * capacity);
  }
  for (int64_t k = 0; k < depth; k += kGroup) {
    for (int i = 0; i < rows; ++i, out += kGroup) {
      std::memcpy(out, reinterpret_cast<const uint8_t*>(codes + i * pitch) + k, kGroup);
    }
  }
}

}  // namespace
}  // namespace ocsquant
