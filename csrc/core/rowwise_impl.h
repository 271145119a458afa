// Passes over rows of floats, written once over Simd. Included inside a target region, after simd_*.h and the standard
// headers. Blocks of 64 floats: the sums below have one accumulator per position modulo 64, whatever the vector width.
#pragma once

namespace ocsquant {
namespace {

constexpr int kLanes = 64;
constexpr int kVectors = kLanes / Simd::W;

// Its loops are unrolled by order: GCC 12 would make them calls of memset and memcpy, and keep the sums in memory.
struct LaneSum {
  Simd::F lane[kVectors];
  OCSQ_INLINE LaneSum() {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) lane[v] = Simd::set1(0.0f);
  }
  // Lanes l and l + 32 first, then + 16, ... + 1: the order the definition fixes.
  OCSQ_INLINE float total() const { return Simd::reduce_halves(folded<0, kVectors>()); }

 private:
  // The sum of the vectors from kFirst on: v and v + kCount / 2 first.
  template <int kFirst, int kCount, int kStride = 1>
  OCSQ_INLINE Simd::F folded() const {
    if constexpr (kCount == 1) {
      return lane[kFirst];
    } else {
      return Simd::add(folded<kFirst, kCount / 2, kStride * 2>(), folded<kFirst + kStride, kCount / 2, kStride * 2>());
    }
  }
};

// Calls block(pointer, offset) for every 64 values of x, the last ones followed by `pad`.
template <class Block>
OCSQ_INLINE void for_blocks(const float* x, int64_t k, Block& block, float pad = 0.0f) {
  int64_t j = 0;
  for (; j + kLanes <= k; j += kLanes) block(x + j, j);
  if (j < k) {
    // Not by memcpy: around a call the sums would go to memory and back.
    float padded[kLanes];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = j + v * Simd::W, left = k - at;
      const int count = left > Simd::W ? Simd::W : left < 0 ? 0 : static_cast<int>(left);
      Simd::store(padded + v * Simd::W, Simd::load_first(x + (left > 0 ? at : j), count, Simd::set1(pad)));
    }
    block(padded, j);
  }
}

// Constructors are written out: the compiler defines implicit ones at the end of the file, outside the target region.
struct RowStatistics {
  Simd::I largest;
  LaneSum squares;
  OCSQ_INLINE RowStatistics() : largest(Simd::zero_i()), squares() {}
  OCSQ_INLINE void operator()(const float* p, int64_t) {
    for (int v = 0; v < kVectors; ++v) {
      const Simd::F x = Simd::load(p + v * Simd::W);
      largest = Simd::max_i(largest, Simd::abs_bits(x));
      squares.lane[v] = Simd::add(squares.lane[v], Simd::mul(x, x));
    }
  }
};

struct RowMaximum {
  Simd::I largest;
  OCSQ_INLINE RowMaximum() : largest(Simd::zero_i()) {}
  OCSQ_INLINE void operator()(const float* p, int64_t) {
    for (int v = 0; v < kVectors; ++v) largest = Simd::max_i(largest, Simd::abs_bits(Simd::load(p + v * Simd::W)));
  }
};

// Where the codes of a row go, in order and up to a whole block of 64; `beyond` has bits of those that are outliers.
struct CodesOut {
  int16_t* codes;
  template <bool kOutliers>
  OCSQ_INLINE void put(int64_t j, Simd::Codes some, uint32_t) {
    Simd::store_codes(codes + j, some);
  }
  OCSQ_INLINE void zeros(int64_t k) { std::memset(codes, 0, (k + kLanes - 1) / kLanes * kLanes * sizeof(int16_t)); }
  // Calls look(j) for every pair of vectors of k codes, j their position, that may hold outliers.
  template <class Look>
  OCSQ_INLINE void for_outliers(int64_t k, const Look& look) const {
    for (int64_t j = 0; j < k; j += 2 * Simd::W) look(j);
  }
};

// How many codes lie beyond a limit: 16-bit counts of a few blocks first.
class OutlierCount {
 public:
  // Written out, as those above.
  OCSQ_INLINE OutlierCount() : lanes_(Simd::set1_codes(0)) {}
  // The bits of those of some codes, which join the count.
  OCSQ_INLINE uint32_t add(Simd::Codes codes, int limit) {
    const auto beyond = Simd::beyond(codes, limit);
    lanes_ = Simd::count(lanes_, beyond);
    return Simd::bits(beyond);
  }
  OCSQ_INLINE void end_block() {
    if (--blocks_left_ > 0) return;
    total_ = total();
    lanes_ = Simd::set1_codes(0);
    blocks_left_ = kBlocks;
  }
  OCSQ_INLINE int64_t total() const { return total_ + Simd::reduce_codes(lanes_); }

 private:
  static constexpr int kBlocks = (1 << 15) / kLanes;
  Simd::Codes lanes_;
  int64_t total_ = 0;
  int blocks_left_ = kBlocks;
};

// 64 codes from position j on, code(at) those of a vector, of which bound() may change some. Those beyond +-limit,
// where some may be, are counted.
template <bool kOutliers, class Out, class Code, class Bound>
OCSQ_INLINE void put_block(Out& out, int64_t j, int limit, const Code& code, const Bound& bound,
                           OutlierCount& outliers) {
  for (int v = 0; v < kVectors; v += 2) {
    const Simd::I a = code(v * Simd::W);
    Simd::Codes both = Simd::pack_codes(a, code((v + 1) * Simd::W));
    bound(both);
    uint32_t which = 0;
    if constexpr (kOutliers) which = outliers.add(both, limit);
    out.template put<kOutliers>(j + v * Simd::W, both, which);
  }
  if constexpr (kOutliers) outliers.end_block();
}

// kOutliers: some codes may be beyond +-limit, and are counted.
template <bool kOutliers, class Out>
struct RowCodes {
  Out out;
  Simd::F inverse;
  int limit;
  OutlierCount outliers;
  OCSQ_INLINE RowCodes(const Out& to, float step, int bound)
      : out(to), inverse(Simd::set1(step > 0.0f ? 1.0f / step : 0.0f)), limit(bound), outliers() {}
  OCSQ_INLINE void operator()(const float* p, int64_t j) {
    put_block<kOutliers>(
        out, j, limit,
        [&](int64_t at)
            __attribute__((always_inline)) { return Simd::round_to_int(Simd::mul(Simd::load(p + at), inverse)); },
        [](Simd::Codes&) {}, outliers);
  }
};

// Puts round_up(k, 64) codes; returns how many lie beyond +-limit.
template <bool kOutliers, class Out>
OCSQ_INLINE int64_t round_row(const float* x, int64_t k, float step, int limit, Out& out) {
  RowCodes<kOutliers, Out> block(out, step, limit);
  for_blocks(x, k, block);
  out = block.out;
  return block.outliers.total();
}

OCSQ_INLINE float bits_to_float(int32_t bits) {
  float v;
  std::memcpy(&v, &bits, 4);
  return v;
}

OCSQ_INLINE float usable_step(float step) { return step < 0x1p-120f ? 0.0f : step; }

// The largest of some values, as bits: those of floats from 0 on have their order.
class Largest {
 public:
  explicit Largest(int count) : count_(count) {}
  // All |x| beyond a limit.
  OCSQ_INLINE void add(const float* x, int64_t k, float beyond) {
    const Simd::I limit = Simd::abs_bits(Simd::set1(beyond));
    int size = size_;  // not the member: each addition would wait for the last one to come back from memory
    for (int64_t j = 0; j < k; j += Simd::W) {
      const int count = k - j < Simd::W ? static_cast<int>(k - j) : Simd::W;
      const Simd::F values = count == Simd::W ? Simd::load(x + j) : Simd::load_first(x + j, count, Simd::set1(0.0f));
      const Simd::I bits = Simd::abs_bits(values);
      size += Simd::keep(bits, Simd::greater(bits, limit), held_ + size);
      if (size > kRoom - Simd::W) size = forget(size);
    }
    size_ = size;
  }
  // The count-th of them, once there are that many.
  int32_t last() { return last(size_); }

 private:
  static constexpr int kRoom = 128;
  static_assert(kRoom - Simd::W > kMaxOutliers + 1);

  // The largest that is exceeded or equalled by `count`.
  int32_t last(int size) {
    for (int i = size; i < size + Simd::W - 1; ++i) held_[i] = -1;
    int32_t found = -1;
    for (int i = 0; i < size; ++i) {
      const Simd::I below = Simd::set1_i(held_[i] - 1);
      int at_least = 0;
      for (int j = 0; j < size; j += Simd::W) {
        at_least += __builtin_popcount(Simd::greater(Simd::load_i(held_ + j), below));
      }
      const int32_t candidate = at_least >= count_ ? held_[i] : -1;
      found = candidate > found ? candidate : found;
    }
    return found;
  }

  // All but the `count` largest; returns how many are left.
  __attribute__((noinline)) int forget(int size) {
    const int32_t least = last(size);
    int kept = 0;
    for (int i = 0; i < size; ++i) {
      if (held_[i] > least) held_[kept++] = held_[i];
    }
    while (kept < count_) held_[kept++] = least;
    return kept;
  }

  int count_, size_ = 0;
  int32_t held_[kRoom + Simd::W];
};

// The (rank+1)-th largest |x|, where more than `rank` are beyond `bulk` and have the codes of outliers.
template <class Out>
OCSQ_INLINE float outlier_magnitude(const float* x, int64_t k, float bulk, int rank, const Out& out) {
  Largest largest(rank + 1);
  out.for_outliers(k, [&](int64_t j) __attribute__((always_inline)) {
    largest.add(x + j, k - j < 2 * Simd::W ? k - j : 2 * Simd::W, bulk);
  });
  return bits_to_float(largest.last());
}

// How a token becomes codes (methods: run-time OCS, definition): the first step to try, NaN for a row with NaN or
// Inf, and the magnitude it is of where that is not the largest.
struct RowRange {
  float step, bulk;
};

OCSQ_INLINE float largest_code(const TokenQuantizer& how) { return static_cast<float>((1 << (how.bits - 1)) - 1); }

OCSQ_INLINE RowRange range_of_row(const float* x, int64_t k, const TokenQuantizer& how) {
  float absmax, bulk = std::numeric_limits<float>::infinity();
  if (how.max_outliers > 0) {
    RowStatistics statistics;
    for_blocks(x, k, statistics);
    absmax = bits_to_float(Simd::reduce_max(statistics.largest));
    const float squares = statistics.squares.total();
    if (squares >= 0x1p-100f && squares <= std::numeric_limits<float>::max()) {
      bulk = how.threshold * std::sqrt(squares / static_cast<float>(k));
    }
  } else {
    RowMaximum maximum;
    for_blocks(x, k, maximum);
    absmax = bits_to_float(Simd::reduce_max(maximum.largest));
  }
  const bool finite = absmax <= std::numeric_limits<float>::max();
  // Not a branch on whether there are outliers: every other token has some.
  const float step = usable_step((bulk < absmax ? bulk : absmax) / largest_code(how));
  return {finite ? step : std::numeric_limits<float>::quiet_NaN(), bulk};
}

// One token to codes, all 0 where it holds NaN or Inf; returns the step.
template <class Out>
OCSQ_INLINE float quantize_row(const float* x, int64_t k, const TokenQuantizer& how, const RowRange& range, Out& out) {
  const int limit = (1 << (how.bits - 1)) - 1;
  float step = range.step;
  if (step != step) {
    out.zeros(k);
  } else if (how.max_outliers == 0) {
    round_row<false>(x, k, step, limit, out);
  } else {
    Out first = out;
    if (round_row<true>(x, k, step, limit, first) > how.max_outliers) {
      step = usable_step(outlier_magnitude(x, k, range.bulk, how.max_outliers, first) / largest_code(how));
      first = out;
      round_row<true>(x, k, step, limit, first);
    }
    out = first;
  }
  return step;
}

// Columns [first, last) of a row, scaled to y[last - first].
inline void scale_row(const float* x, const TokenQuantizer& how, int64_t first, int64_t last, float* y) {
  for (int64_t j = first; j < last; ++j) {
    const float centred = how.shift != nullptr ? x[j] - how.shift[j] : x[j];
    *y++ = how.inverse != nullptr ? centred * how.inverse[j] : centred;
  }
}

inline void widen(const uint16_t* x, int64_t n, float* y) {
  int64_t j = 0;
  for (; j + Simd::W <= n; j += Simd::W) Simd::store(y + j, Simd::load_bf16(x + j));
  for (; j < n; ++j) y[j] = bits_to_float(static_cast<int32_t>(static_cast<uint32_t>(x[j]) << 16));
}

struct NarrowBlock {
  uint16_t* y;
  int64_t n;
  OCSQ_INLINE void operator()(const float* p, int64_t j) {
    uint16_t block[kLanes];
    for (int v = 0; v < kVectors; ++v) Simd::store_bf16(block + v * Simd::W, Simd::load(p + v * Simd::W));
    std::memcpy(y + j, block, (n - j < kLanes ? n - j : kLanes) * sizeof(uint16_t));
  }
};

inline void narrow(const float* x, int64_t n, uint16_t* y) {
  NarrowBlock block{y, n};
  for_blocks(x, n, block);
}

}  // namespace
}  // namespace ocsquant
