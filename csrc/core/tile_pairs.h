// Tiles for vpmaddubsw, which adds two products of unsigned weight and signed activation bytes in 16 bits and
// saturates. It cannot, whatever the weights, where both activations and their sum are within +-127: unsigned weights
// make the sum of two products lie between 0, or one of them, and 255 * 127 < 2^15. So each row is split into bodies
// that keep to that and rests that hold what is left: its outliers, and the excess of its few large pairs of one sign.
// Weights of small offset are below 128, where pairs of any two bodies fit: 2 * 127 * 127 < 2^15.
// Rows with many large pairs (all values of one size) stay int16; a flag tells. Included inside an AVX2 target region.
//
// A tile in memory: int32 flag, then either the codes of tile_int16.h, or a byte for every span of 16 channels (half
// the largest norm of a lane, as in pack.h) and the spans: [rows] pairs of int16, minus the sums of the lanes' bodies,
// and [4][rows][4] bodies.
#pragma once

namespace ocsquant {
namespace {

struct PairTile {
  static constexpr int64_t kChannels = kSpan * kGroup;
  static constexpr int kLimit = 127;

  static int64_t spans(int64_t depth) { return (depth + kChannels - 1) / kChannels; }
  static int64_t span_bytes(int rows) { return (kChannels + 4) * rows; }
  static int64_t header_bytes(int64_t depth) { return 4 + (spans(depth) + 3) / 4 * 4; }
  static int64_t row_bytes(int64_t depth) {
    const int64_t narrow = span_bytes(1) * spans(depth), wide = depth * static_cast<int64_t>(sizeof(int16_t));
    return header_bytes(depth) + (narrow > wide ? narrow : (wide + 3) / 4 * 4);
  }
  // Beyond a rest every 12 channels the int16 kernel is faster.
  static int64_t rest_capacity(int64_t depth, int) { return depth / 12 + 2; }

  static bool is_wide(const uint8_t* tile) {
    int32_t wide;
    std::memcpy(&wide, tile, sizeof(wide));
    return wide != 0;
  }
  static Offset offset(const uint8_t* tile) { return is_wide(tile) ? Offset::all : Offset::rests; }
  static const int16_t* wide_codes(const uint8_t* tile) { return reinterpret_cast<const int16_t*>(tile + 4); }
  static const uint8_t* bounds(const uint8_t* tile) { return tile + 4; }

  static void place(int16_t* codes, int64_t pitch, int64_t depth, const TileRows& out) {
    // A small layer does not earn back what splitting costs (benchmarks/small_layers.py).
    const bool split = out.panels > 1 && depth * out.panels > 256;
    const int32_t wide = !split || !place_bodies(codes, pitch, depth, out);
    std::memcpy(out.tile, &wide, sizeof(wide));
    if (!wide) return;
    for (int i = 0; i < out.rows; ++i) {
      int16_t* row = codes + i * pitch;
      const Rest* rests = out.rests + i * out.rest_capacity;
      for (int32_t r = 0; split && r < out.rest_count[i]; ++r) row[rests[r].k] += rests[r].value;
      out.rest_count[i] = 0;
      out.offset_codes[i] = sum_of(row, depth);
    }
    place_int16(codes, pitch, depth, out.rows, reinterpret_cast<int16_t*>(out.tile + 4));
  }

 private:
  static int pair_limit(const TileRows& out) { return out.weight_offset < kOffset / 2 ? 2 * kLimit : kLimit; }

  // Clips a pair to what a byte holds, then takes what its sum is beyond the limit off the larger one.
  static void split_pair(int16_t* pair, int64_t k, int limit, Rest* rests, int32_t& count) {
    int body[2];
    for (int i = 0; i < 2; ++i) body[i] = pair[i] > kLimit ? kLimit : pair[i] < -kLimit ? -kLimit : pair[i];
    const int sum = body[0] + body[1], larger = std::abs(body[0]) >= std::abs(body[1]) ? 0 : 1;
    body[larger] -= sum > limit ? sum - limit : sum < -limit ? sum + limit : 0;
    // Written in any case, there is room for two: nobody could predict which of them it is.
    for (int i = 0; i < 2; ++i) {
      rests[count] = {static_cast<int32_t>(k + i), pair[i] - body[i]};
      count += pair[i] != body[i];
      pair[i] = static_cast<int16_t>(body[i]);
    }
  }

  // One span of up to four rows: the codes and the sums of their pairs.
  struct Span {
    __m256i codes[4], pairs[4];

    // A bit for every pair of which a code is beyond what a byte holds, or the sum beyond the limit; `split` knows
    // which is where.
    OCSQ_INLINE uint32_t beyond(__m256i limit) const {
      __m256i fits[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i outlier = _mm256_cmpgt_epi16(_mm256_abs_epi16(codes[i]), _mm256_set1_epi16(kLimit));
        // The mask of one half of a pair as a number of it: 65535 or more, so that one comparison finds both.
        const __m256i largest = _mm256_max_epu32(_mm256_abs_epi32(pairs[i]), outlier);
        fits[i] = _mm256_cmpeq_epi32(_mm256_min_epu32(largest, limit), largest);
      }
      const __m256i all =
          _mm256_packs_epi16(_mm256_packs_epi32(fits[0], fits[1]), _mm256_packs_epi32(fits[2], fits[3]));
      return ~static_cast<uint32_t>(_mm256_movemask_epi8(all));
    }

    // Two int16 for every row: minus the sums of channels 0 and 1 of every group, and of channels 2 and 3.
    OCSQ_INLINE __m128i minus_lanes() const {
      const __m256i a = _mm256_packs_epi32(pairs[0], pairs[1]), b = _mm256_packs_epi32(pairs[2], pairs[3]);
      const __m128 x = _mm_castsi128_ps(_mm_add_epi16(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1)));
      const __m128 y = _mm_castsi128_ps(_mm_add_epi16(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1)));
      const __m128i even = _mm_castps_si128(_mm_shuffle_ps(x, y, 0x88)),
                    odd = _mm_castps_si128(_mm_shuffle_ps(x, y, 0xdd));
      return _mm_sub_epi16(_mm_setzero_si128(), _mm_add_epi16(even, odd));
    }

    // The largest sum of squares of any row's lane.
    OCSQ_INLINE int32_t squares() const {
      __m256i largest = _mm256_setzero_si256();
#pragma GCC unroll 2
      for (int i = 0; i < 4; i += 2) {
        const __m256i a = _mm256_madd_epi16(codes[i], codes[i]), b = _mm256_madd_epi16(codes[i + 1], codes[i + 1]);
        // Channels 0..7 of both rows beside channels 8..15, then the two groups of each.
        const __m256i halves =
            _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31));
        largest = _mm256_max_epi32(largest, _mm256_add_epi32(halves, _mm256_shuffle_epi32(halves, 0x4e)));
      }
      const __m128i rows = _mm_max_epi32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
      return _mm_cvtsi128_si32(_mm_max_epi32(rows, _mm_shuffle_epi32(rows, 0xb1)));
    }

    // [group][row] quads of int8.
    OCSQ_INLINE void bodies(__m128i (&groups)[kSpan]) const {
      __m128i row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        row[i] = _mm_packs_epi16(_mm256_castsi256_si128(codes[i]), _mm256_extracti128_si256(codes[i], 1));
      }
      const __m128i a = _mm_unpacklo_epi32(row[0], row[1]), b = _mm_unpackhi_epi32(row[0], row[1]);
      const __m128i c = _mm_unpacklo_epi32(row[2], row[3]), d = _mm_unpackhi_epi32(row[2], row[3]);
      groups[0] = _mm_unpacklo_epi64(a, c);
      groups[1] = _mm_unpackhi_epi64(a, c);
      groups[2] = _mm_unpacklo_epi64(b, d);
      groups[3] = _mm_unpackhi_epi64(b, d);
    }
  };

  template <int R>
  static OCSQ_INLINE Span load_span(const int16_t* codes, int64_t pitch) {
    Span span;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      span.codes[i] =
          i < R ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i * pitch)) : _mm256_setzero_si256();
      span.pairs[i] = _mm256_madd_epi16(span.codes[i], _mm256_set1_epi16(1));
    }
    return span;
  }

  // False if a row needs more rests than it may have.
  static __attribute__((noinline)) bool split(uint32_t beyond, int16_t* codes, int64_t pitch, int64_t k,
                                              const TileRows& out) {
    for (; beyond != 0; beyond &= beyond - 1) {
      const int bit = __builtin_ctz(beyond), row = bit / 4 % 4, at = 2 * (bit % 4 + bit / 16 * 4);
      int32_t& count = out.rest_count[row];
      if (count + 2 > out.rest_capacity) return false;
      split_pair(codes + row * pitch + at, k + at, pair_limit(out), out.rests + row * out.rest_capacity, count);
    }
    return true;
  }

  // False if a row needs more rests than it may have; its rests so far are then still taken off its codes.
  template <int R>
  static bool place_bodies(int16_t* codes, int64_t pitch, int64_t depth, const TileRows& out) {
    for (int i = 0; i < R; ++i) out.rest_count[i] = out.offset_codes[i] = 0;
    uint8_t* to = out.tile + header_bytes(depth);
    const __m256i limit = _mm256_set1_epi32(pair_limit(out));
    constexpr int64_t kBatch = 64;
    int32_t squares[kBatch];
    for (int64_t s = 0, last = spans(depth); s < last; ++s, codes += kChannels, to += span_bytes(R)) {
      Span span = load_span<R>(codes, pitch);
      if (const uint32_t beyond = span.beyond(limit); beyond != 0) {
        if (!split(beyond, codes, pitch, s * kChannels, out)) return false;
        span = load_span<R>(codes, pitch);
      }
      __m128i quads[1 + kSpan];
      quads[0] = span.minus_lanes();
      span.bodies(*reinterpret_cast<__m128i(*)[kSpan]>(quads + 1));
#pragma GCC unroll 5
      for (int q = 0; q <= kSpan; ++q) std::memcpy(to + q * R * kGroup, quads + q, R * kGroup);
      squares[s % kBatch] = span.squares();
      if (s % kBatch < kBatch - 1 && s + 1 < last) continue;
      uint8_t* norms = out.tile + 4 + s / kBatch * kBatch;
      for (int64_t j = 0; j <= s % kBatch; ++j) norms[j] = half_norm(squares[j]);
    }
    for (int i = 0; i < R; ++i) {
      const Rest* rests = out.rests + i * out.rest_capacity;
      for (int32_t r = 0; r < out.rest_count[i]; ++r) out.offset_codes[i] += rests[r].value;
    }
    return true;
  }

  static bool place_bodies(int16_t* codes, int64_t pitch, int64_t depth, const TileRows& out) {
    switch (out.rows) {
      case 1:
        return place_bodies<1>(codes, pitch, depth, out);
      case 2:
        return place_bodies<2>(codes, pitch, depth, out);
      case 3:
        return place_bodies<3>(codes, pitch, depth, out);
      default:
        return place_bodies<4>(codes, pitch, depth, out);
    }
  }
};

}  // namespace
}  // namespace ocsquant
