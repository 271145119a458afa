// Rows of int8 codes, for kernels that multiply unsigned weights by signed activations: a code becomes a body that a
// byte holds and, where that is not all of it, a rest. Included inside a target region, after
//   Narrow::store(codes, out)        Simd::Codes to as many bodies
//   Narrow::operator()(codes, out)   the same; the codes join Narrow::sum()
//   Narrow::sum_bytes(bytes, count)  of a multiple of 64 bodies
//   Narrow::first(codes, count)      the first `count` of Simd::Codes in memory, then zeros
#pragma once

namespace ocsquant {
namespace {

// An odd number of cache lines, so that the rows of a tile do not share the places of a cache.
inline int64_t int8_row_bytes(int64_t depth) { return ((depth + 63) / 64 | 1) * 64; }

// Where the rows of a tile stand.
struct CodeRows {
  const uint8_t* first;
  int64_t pitch;
  OCSQ_INLINE CodeRows from_group(int64_t g) const { return {first + g * kGroup, pitch}; }
  OCSQ_INLINE int32_t quad(int row) const {
    int32_t codes;
    std::memcpy(&codes, first + row * pitch, sizeof(codes));
    return codes;
  }
};

// Of the bits of Simd::beyond() one for each code.
constexpr uint32_t kOnce = Simd::kCodeBits == 1 ? ~0u : 0x55555555;

// Without branches, as the signs of outliers cannot be predicted.
OCSQ_INLINE int32_t rest_of(int code) {
  const int above = code > 127 ? code - 127 : 0, below = code < -128 ? code + 128 : 0;
  return above | below;
}

// Codes become bodies as they come; those that may have rests are noted, and looked at once the row is complete.
class BytesOut {
 public:
  // Of `codes`: the row itself and, where another would be, the notes, read up to whole vectors into a third.
  static constexpr int kRowsOfNotes = 3;
  int16_t* codes;

  OCSQ_INLINE BytesOut(int16_t* all, int64_t pitch, const TileRows& tile, int row)
      : codes(all),
        bytes_(tile.tile + row * tile.row_bytes),
        beyond_(reinterpret_cast<int32_t*>(all + pitch)),
        tile_(&tile),
        row_(row) {}
  // k codes will be put; those that fill no vector, and whatever is behind them, are taken from memory at the end.
  OCSQ_INLINE void expect(int64_t k) { put_ = k / kCodes * kCodes; }
  template <bool kOutliers>
  OCSQ_INLINE void put(int64_t j, Simd::Codes some, uint32_t beyond) {
    Simd::store_codes(codes + j, some);
    if (j < put_) add<kOutliers>(j, some, beyond);
    noted_ = kOutliers;
  }
  OCSQ_INLINE void zeros(int64_t k) {
    CodesOut{codes}.zeros(k);
    put_ = 0;
  }
  template <class Look>
  OCSQ_INLINE void for_outliers(int64_t k, const Look& look) const {
    static_assert(kCodes == 2 * Simd::W);
    const int64_t vectors = put_ / kCodes;
    for (int64_t v = 0; v < vectors; v += 64) {
      for (uint64_t some = with_outliers(v, vectors - v); some != 0; some &= some - 1) {
        look((v + __builtin_ctzll(some)) * kCodes);
      }
    }
    for (int64_t j = put_; j < k; j += kCodes) look(j);
  }
  OCSQ_INLINE void finish(int64_t depth) {
    for (int64_t j = put_; j < depth; j += kCodes) {
      const Simd::Codes some = Narrow::first(codes + j, depth - j);
      add<true>(j, some, Simd::bits(Simd::beyond(some, 127)));
    }
    tile_->rest_count[row_] = noted_ ? find_rests(depth) : 0;
    tile_->offset_codes[row_] = narrow_.sum();
  }

 private:
  static constexpr int64_t kCodes = sizeof(Simd::Codes) / sizeof(int16_t);

  OCSQ_INLINE int32_t find_rests(int64_t depth) {
    const int64_t vectors = (depth + kCodes - 1) / kCodes;
    Rest* rests = tile_->rests + row_ * tile_->rest_capacity;
    int32_t count = 0;
    for (int64_t v = 0; v < vectors; v += 64) {
      for (uint64_t some = with_outliers(v, vectors - v); some != 0; some &= some - 1) {
        const int64_t at = v + __builtin_ctzll(some);
        for (uint32_t beyond = static_cast<uint32_t>(beyond_[at]) & kOnce; beyond != 0; beyond &= beyond - 1) {
          const int64_t k = at * kCodes + __builtin_ctz(beyond) / Simd::kCodeBits;
          const int32_t rest = rest_of(codes[k]);
          rests[count] = {static_cast<int32_t>(k), rest};  // there is room for every outlier, whether it has one
          count += rest != 0;
        }
      }
    }
    return count;
  }

  // Which of the vectors from v on have outliers, of 64 at most.
  OCSQ_INLINE uint64_t with_outliers(int64_t v, int64_t count) const {
    uint64_t some = 0;
    for (int i = 0; i < 64 && i < count; i += Simd::W) {
      some |= static_cast<uint64_t>(Simd::nonzero(Simd::load_i(beyond_ + v + i))) << i;
    }
    return count < 64 ? some & ((uint64_t{1} << count) - 1) : some;
  }

  // Branches on no outlier: nobody could predict where they are.
  template <bool kOutliers>
  OCSQ_INLINE void add(int64_t j, Simd::Codes some, uint32_t beyond) {
    narrow_(some, bytes_ + j);
    if constexpr (!kOutliers) return;
    beyond_[j / kCodes] = static_cast<int32_t>(beyond);
  }

  Narrow narrow_;
  uint8_t* bytes_;
  int32_t* beyond_;  // for every vector of codes, which are outliers
  int64_t put_ = 0;
  bool noted_ = true;  // where no code that was put could be an outlier, none of its copies is one
  const TileRows* tile_;
  int row_;
};

// Every row is there when it is finished.
inline void placed(int16_t*, int64_t, int64_t, const TileRows&) {}

// An outlier has one rest for its column and one for its tail column.
constexpr int64_t outlier_rests(int64_t, int max_outliers) { return 2 * static_cast<int64_t>(max_outliers); }

}  // namespace
}  // namespace ocsquant
