// Weights of fewer than 8 bits become bytes again, a block at a time in cache, as the tiles read them: one code path
// for all widths, zero points and tables of levels, and the same products; or, of single groups, in registers. Included
// inside a target region, after simd_*.h and stored_impl.h.
#pragma once

namespace ocsquant {
namespace {

// Eight codes of `bits` bits out of the lowest of each byte.
template <int kBits>
OCSQ_INLINE uint64_t lowest(uint64_t word) {
  return word & (0x0101010101010101 * ((1 << kBits) - 1));
}

// Group j of a span (pack.h), each code plus what `add` holds for its column; no sum leaves its byte.
template <int kBits>
OCSQ_INLINE void unpack_group(const uint8_t* span, int64_t j, const uint8_t* add, uint8_t* out) {
  constexpr int64_t kPlane = kBits == 2 ? 0 : kSpan / 2 * kGroupBytes;  // bytes of the plane of four bits
  const uint8_t* low = span + (kBits == 2 ? 0 : j % 2 * kGroupBytes);
  const int shift = static_cast<int>(kBits == 2 ? 2 * j : j / 2 * 4);
  for (int64_t i = 0; i < kGroupBytes; i += 8) {
    uint64_t word, high, sum;
    std::memcpy(&word, low + i, sizeof(word));
    std::memcpy(&sum, add + i, sizeof(sum));
    sum += lowest<kBits == 2 ? 2 : 4>(word >> shift);
    if (kBits == 6) {
      std::memcpy(&high, span + kPlane + i, sizeof(high));
      sum += lowest<2>(high >> 2 * j) << 4;
    }
    std::memcpy(out + i, &sum, sizeof(sum));
  }
}

// What bytes the numbers stand for that a table of levels maps.
inline void fill_table(const PackedWeight& w, uint8_t* table) {
  for (int64_t i = 0; i < kMaxEntries; ++i) table[i] = static_cast<uint8_t>(w.levels[i] + kOffset);
}

// A run of groups of one panel, starting with a span.
struct Block {
  const uint8_t* weights;
  const uint8_t* bounds;  // of its spans
  const uint8_t* next;    // what will be needed after it, to be fetched into the cache, or null
  int64_t first_group;
  int64_t groups;
  int64_t width;       // columns that exist
  int offset;          // what the bytes have in them beside the codes
  bool first;          // start the sums instead of adding to them
  int bits;            // of `weights`; below 8, the numbers in them become bytes by
  Mapping mapping;     // adding
  const uint8_t* map;  // [kGroupBytes], or looking up in [kMaxEntries]
};

// Any group of a panel, in registers: the base as it is stored, the split channels behind it as bytes.
struct StoredPanel {
  const uint8_t *base, *tail;
  int64_t base_groups;
  int bits;            // of the base, whose numbers become bytes
  Mapping mapping;     // by adding
  const uint8_t* map;  // [kGroupBytes], or looking up in [kMaxEntries]

  template <class Vec, class S, int kVectors>
  OCSQ_INLINE void load(int64_t g, typename Vec::V (&bytes)[kVectors]) const {
    constexpr int kBytes = sizeof(bytes[0]);
    if (S::kBytes || g >= base_groups) {
      const uint8_t* from = S::kBytes ? base + g * kGroupBytes : tail + (g - base_groups) * kGroupBytes;
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) bytes[v] = Vec::load(from + kBytes * v);
    } else {
      const uint8_t* span = base + g / kSpan * S::kSpanBytes;
      const int in_span = static_cast<int>(g % kSpan);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) bytes[v] = S::load(span, in_span, kBytes * v, map);
    }
  }
};

// One panel of a packed weight as bytes: code + offset().
class Panel {
 public:
  OCSQ_INLINE Panel(const PackedWeight& w, int64_t panel, uint8_t* scratch)
      : w_(w),
        codes_(w.packed + panel * w.panel_bytes()),
        bounds_(codes_ + w.code_blocks() * kGroupBytes),
        first_column_(panel * kPanel),
        scratch_(scratch) {}

  // Groups [g, g + count) or fewer, of one scale, valid until the next call. Below 8 bits they are unpacked into the
  // scratch, at most kUnpackedGroups, unless `as_stored`.
  OCSQ_INLINE Block block(int64_t g, int64_t count, bool as_stored) {
    const int64_t base = w_.base_groups(), left = w_.n - first_column_;
    Block b = {place(g), bounds_ + g / kSpan, nullptr, g, count, left < kPanel ? left : kPanel, w_.offset(), g == 0,
               8,        Mapping::none,       nullptr};
    if (w_.bits == 8 || (as_stored && g >= base)) {
      // As it is.
    } else if (as_stored) {
      if (g + count > base) b.groups = base - g;
      find_map(g);
      b.bits = w_.bits;
      b.mapping = mapping();
      b.map = map_;
    } else {
      b.weights = unpack(g, count, scratch_);
    }
    b.next = place(g + b.groups);
    return b;
  }

  // All groups that have their scale with group g.
  OCSQ_INLINE StoredPanel stored(int64_t g = 0) {
    const int64_t base = w_.base_groups();
    if (w_.bits < 8) find_map(g);
    return {codes_, place(base), base, w_.bits, w_.bits < 8 ? mapping() : Mapping::none, map_};
  }

 private:
  OCSQ_INLINE Mapping mapping() const {
    const bool shifted = w_.zero != nullptr || w_.offset() != 1 << (w_.bits - 1);
    return w_.levels != nullptr ? Mapping::levels : shifted ? Mapping::shift : Mapping::none;
  }

  // Where group g is kept, the first of a span below 8 bits.
  OCSQ_INLINE const uint8_t* place(int64_t g) const {
    const int64_t base = w_.base_groups();
    return codes_ + (g < base ? g * w_.bits / 8 : base * w_.bits / 8 + g - base) * kGroupBytes;
  }

  __attribute__((noinline)) const uint8_t* unpack(int64_t g, int64_t count, uint8_t* out) {
    const int64_t base = w_.base_groups(), last = g + count, packed = last < base ? last : base;
    const int64_t span_bytes = kSpan * kGroupBytes * w_.bits / 8;
    if (g < packed) find_map(g);
    static constexpr uint8_t kNothing[kGroupBytes] = {};
    const uint8_t* add = w_.levels != nullptr ? kNothing : map_;
    uint8_t* to = out;
    for (; g < packed; ++g, to += kGroupBytes) {
      const uint8_t* span = codes_ + g / kSpan * span_bytes;
      switch (w_.bits) {
        case 2:
          unpack_group<2>(span, g % kSpan, add, to);
          break;
        case 4:
          unpack_group<4>(span, g % kSpan, add, to);
          break;
        default:
          unpack_group<6>(span, g % kSpan, add, to);
      }
      if (w_.levels != nullptr) Simd::look_up(map_, w_.bits, kGroupBytes, to);
    }
    if (g < last) std::memcpy(to, place(g), (last - g) * kGroupBytes);
    return out;
  }

  // What makes bytes of group g's numbers: a table of levels, or what is to be added for each column.
  void find_map(int64_t g) {
    const int64_t of = w_.group_channels > 0 ? g * kGroup / w_.group_channels : 0;
    if (of == map_of_ || (map_of_ >= 0 && w_.zero == nullptr)) return;
    map_of_ = of;
    if (w_.levels != nullptr) {
      fill_table(w_, map_);
    } else if (w_.zero == nullptr) {
      std::memset(map_, w_.offset() - (1 << (w_.bits - 1)), kGroupBytes);
    } else {
      const uint8_t* zero = w_.zero + of * w_.n + first_column_;
      const int64_t left = w_.n - first_column_;
      uint8_t some[kPanel] = {};
      if (left < kPanel) {
        std::memcpy(some, zero, left);
        zero = some;
      }
      // Four times the same byte, for all columns alike: the compiler makes vectors of it.
      const uint32_t offset = static_cast<uint32_t>(w_.offset());
      uint32_t shifts[kPanel];
      for (int64_t j = 0; j < kPanel; ++j) shifts[j] = (offset - zero[j]) * 0x01010101u;
      std::memcpy(map_, shifts, sizeof(shifts));
    }
  }

  const PackedWeight& w_;
  const uint8_t* codes_;
  const uint8_t* bounds_;  // of all its spans
  int64_t first_column_;
  uint8_t* scratch_;
  int64_t map_of_ = -1;
  alignas(64) uint8_t map_[kGroupBytes];
};

}  // namespace
}  // namespace ocsquant
