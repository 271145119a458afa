// The quantized linear, written once over Simd and a Tile (the integer micro-kernel of one instruction set). Included
// inside a target region. Tile provides:
//   kRows                                     rows of a tile
//   row_bytes(depth)                          bytes of memory for each row of a tile, laid out as the Tile likes
//   rest_capacity(depth, max_outliers)
//   Out(codes, pitch, tile, i)                what takes the codes of row i: expect(k) before they are put(), zeros(k)
//                                             instead; where they do not come that way they are written to its `codes`,
//                                             as those behind them are; then finish(depth)
//   place(codes, pitch, depth, tile)          row-major int16 codes (its to overwrite) to that memory; fills TileRows,
//                                             where Out::finish() has not done so row by row
//   multiply(rows, tile, depth, block, sums)  sums[row][64] (+)= tile * block for the columns below block.width
//   add_rests(rests, rows, panel, sums)       sums[row][64] += each rest.value * (the bytes of its column)
//   offset(tile)                              in which products the weights' offset stays
//   unpacks(tile, rows)                       whether multiply() takes blocks of fewer than 8 bits for that many rows
//   Plane                                     a sample of a convolution (patches_impl.h)
//   kFewGroups                                whether it is what few_groups_impl.h asks for
#pragma once

namespace ocsquant {
namespace {

// Where a tile and what belongs to its rows are kept.
struct TileRows {
  int rows;
  int64_t panels;     // of the weight it will be multiplied with
  int weight_offset;  // of its bytes
  uint8_t* tile;
  int64_t row_bytes;
  Rest* rests;
  int64_t rest_capacity;
  int32_t* rest_count;
  int32_t* offset_codes;
};

// Of which codes the products still contain the weights' offset.
enum class Offset { none, rests, all };

inline int32_t sum_of(const int16_t* codes, int64_t depth) {
  int32_t sum = 0;
  for (int64_t k = 0; k < depth; ++k) sum += codes[k];
  return sum;
}

inline void sum_groups(const int16_t* codes, const PackedWeight& w, int32_t* sums) {
  for (int64_t g = 0; g < w.scale_groups(); ++g) {
    const int64_t first = g * w.group_channels, left = w.k - first;
    sums[g] = sum_of(codes + first, left < w.group_channels ? left : w.group_channels);
  }
}

// Rows [first, last) of codes, which source.put(row, source.prepare(row), out) puts or writes to out.codes, returning
// their step, as the Tile wants them; `codes` is room for Tile::kRows of them.
template <class Tile, class Source>
OCSQ_INLINE void place_rows(const Source& source, const PackedWeight& w, const Activations& a, int64_t first,
                            int64_t last, int16_t* codes) {
  const int64_t depth = w.depth(), base = w.base_groups() * kGroup;
  // A row's codes are written in blocks of 64, then the tail over what lies beyond the base, then zeros to whole spans.
  const int64_t padded = padded_depth(w), pitch = code_pitch(w);
  for (int64_t m = first; m < last; m += Tile::kRows) {
    const int rows = static_cast<int>(last - m < Tile::kRows ? last - m : Tile::kRows);
    const TileRows tile = {rows,
                           w.panels(),
                           w.offset(),
                           a.codes + m * a.row_bytes,
                           a.row_bytes,
                           a.rests + m * a.rest_capacity,
                           a.rest_capacity,
                           a.rest_count + m,
                           a.offset_codes + m};
    // All rows' first: what one row waits for, another has to do.
    typename Source::Prepared prepared[Tile::kRows];
    for (int i = 0; i < rows; ++i) prepared[i] = source.prepare(m + i);
    for (int i = 0; i < rows; ++i) {
      typename Tile::Out out(codes, pitch, tile, i);
      a.step[m + i] = source.put(m + i, prepared[i], out);
      int16_t* row = out.codes;
      for (int64_t e = w.k; e < base; ++e) row[e] = 0;  // where a range does not begin at 0, its end is not the code 0
      for (int64_t e = 0; e < w.tail; ++e) row[base + e] = row[w.tail_index[e]];
      for (int64_t e = base + w.tail; e < padded; ++e) row[e] = 0;
      if (a.group_offset_codes != nullptr) sum_groups(row, w, a.group_offset_codes + (m + i) * w.scale_groups());
      out.finish(depth);
    }
    Tile::place(codes, pitch, depth, tile);
    if (a.group_offset_codes == nullptr) continue;
    const Offset offset = Tile::offset(a.codes + m * a.row_bytes);
    for (int64_t i = m; i < m + rows && offset != Offset::all; ++i) {
      int32_t* sums = a.group_offset_codes + i * w.scale_groups();
      std::memset(sums, 0, w.scale_groups() * sizeof(int32_t));
      const Rest* rests = a.rests + i * a.rest_capacity;
      const int32_t count = offset == Offset::rests ? a.rest_count[i] : 0;
      for (int32_t r = 0; r < count; ++r) sums[rests[r].k / w.group_channels] += rests[r].value;
    }
  }
}

// Rows out of tokens.
struct TokenRows {
  const void* x;
  Float dtype;
  const TokenQuantizer& how;
  int64_t k;
  float* wide;  // [k]

  using Prepared = RowRange;
  OCSQ_INLINE RowRange prepare(int64_t m) const {
    return dtype == Float::f32 && how.inverse == nullptr && !how.fixed ? range_of_row(row_of(m), k, how) : RowRange{};
  }

  template <class Out>
  OCSQ_INLINE float put(int64_t m, const RowRange& range, Out& out) const {
    out.expect(k);
    if (dtype == Float::f32 && how.inverse == nullptr) {
      return how.fixed ? quantize_row_fixed(row_of(m), k, how, out) : quantize_row(row_of(m), k, how, range, out);
    }
    const float* row = row_of(m);
    if (dtype == Float::bf16) {
      widen(static_cast<const uint16_t*>(x) + m * k, k, wide);
      row = wide;
    }
    if (how.fixed) return quantize_row_fixed(row, k, how, out);
    if (how.inverse != nullptr) scale_row(row, how, 0, k, wide);
    return quantize_row(wide, k, how, range_of_row(wide, k, how), out);
  }

 private:
  OCSQ_INLINE const float* row_of(int64_t m) const { return static_cast<const float*>(x) + m * k; }
};

template <class Tile>
void quantize(const void* x, Float dtype, const TokenQuantizer& how, const PackedWeight& w, const Activations& a,
              int64_t first, int64_t last, void* scratch) {
  int16_t* codes = static_cast<int16_t*>(scratch);
  float* wide = reinterpret_cast<float*>(codes + (Tile::kRows * code_pitch(w) + 31) / 32 * 32);
  place_rows<Tile>(TokenRows{x, dtype, how, w.k, wide}, w, a, first, last, codes);
}

template <class T>
OCSQ_INLINE const T* padded(const T* from, int64_t count, T (&to)[kPanel]) {
  std::memset(to, 0, sizeof(to));
  std::memcpy(to, from, count * sizeof(T));
  return to;
}

// Scale of one panel, or of one group of its channels, and with the last group its bias and nonlinearity; padded to 64
// columns.
struct Epilogue {
  const float* scale;
  const float* bias;
  Nonlinearity nonlinearity;
  int64_t residual, width;
  float edge_scale[kPanel], edge_bias[kPanel];

  OCSQ_INLINE Epilogue(const PackedWeight& w, int64_t panel, int64_t group = 0) {
    const int64_t n0 = panel * kPanel;
    width = w.n - n0 < kPanel ? w.n - n0 : kPanel;
    scale = w.scale + group * w.n + n0;
    const bool last = group + 1 == w.scale_groups();
    bias = w.bias != nullptr && last ? w.bias + n0 : nullptr;
    nonlinearity = last ? w.nonlinearity : Nonlinearity::none;
    residual = w.residual;
    if (width < kPanel) {
      scale = padded(scale, width, edge_scale);
      if (bias != nullptr) bias = padded(bias, width, edge_bias);
    }
  }

  // others: what is added to the outputs. ReLU is a bound like any other.
  template <bool kBias, bool kOthers>
  OCSQ_INLINE void columns(const int32_t* sums, int32_t offset, float step, const float* others, float* y) const {
    const float none = -std::numeric_limits<float>::infinity();
    const Simd::F t = Simd::set1(step), least = Simd::set1(nonlinearity == Nonlinearity::relu ? 0.0f : none);
    const Simd::I o = Simd::set1_i(offset);
    for (int64_t j = 0; j < width; j += Simd::W) {
      const Simd::I sum = Simd::sub_i(Simd::load_i(sums + j), o);
      Simd::F v = Simd::mul(Simd::to_float(sum), Simd::mul(t, Simd::load(scale + j)));
      if (kBias) v = Simd::add(v, Simd::load(bias + j));
      if (kOthers) v = Simd::add(v, Simd::load(others + j));
      Simd::store(y + j, Simd::max(least, v));  // the second of max() where one is NaN
    }
  }

  OCSQ_INLINE void row(const int32_t* sums, int32_t offset, float step, void* y, Float dtype, int64_t at) const {
    float block[kPanel], edge[kPanel];
    const bool whole = dtype == Float::f32 && width == kPanel;
    float* to = whole ? static_cast<float*>(y) + at : block;
    if (residual != 0) {
      const float* others = static_cast<const float*>(y) + at + residual;
      if (!whole) others = padded(others, width, edge);
      bias != nullptr ? columns<true, true>(sums, offset, step, others, to)
                      : columns<false, true>(sums, offset, step, others, to);
    } else {
      bias != nullptr ? columns<true, false>(sums, offset, step, nullptr, to)
                      : columns<false, false>(sums, offset, step, nullptr, to);
    }
    const bool bounded = nonlinearity == Nonlinearity::none || nonlinearity == Nonlinearity::relu;
    if (!bounded) nonlinear(nonlinearity, width, to);
    if (whole) return;
    if (dtype == Float::f32) {
      std::memcpy(static_cast<float*>(y) + at, block, width * sizeof(float));
    } else {
      narrow(block, width, static_cast<uint16_t*>(y) + at);
    }
  }
};

// Kept out of multiply(): together they spill the accumulators of the inner loop (GCC 12).
template <class Tile>
__attribute__((noinline)) void finish(const Activations& a, const PackedWeight& w, const Epilogue& epilogue,
                                      const StoredPanel& weights, int64_t m, int rows, int32_t* sums, void* y,
                                      Float dtype, int64_t panel) {
  static_assert(Tile::kRows <= RestRows::kMaxRows);
  RestRows rests;
  for (int i = 0; i < rows; ++i) {
    rests.of[i] = a.rests + (m + i) * a.rest_capacity;
    rests.count[i] = a.rest_count[m + i];
  }
  Tile::add_rests(rests, rows, weights, sums);
  for (int64_t i = m; i < m + rows; ++i, sums += kPanel) {
    // Modulo 2^32, as the sums are: only the corrected sum fits for certain.
    const int32_t offset = static_cast<int32_t>(w.offset() * static_cast<uint32_t>(a.offset_codes[i]));
    epilogue.row(sums, offset, a.step[i], y, dtype, i * w.n + panel * kPanel);
  }
}

// Rows of the output are pages apart: no prefetcher of the CPU foresees them, and the stores would wait for memory, as
// would reading what is added to them.
OCSQ_INLINE void fetch_output(const void* y, Float dtype, int64_t pitch, int64_t at, int rows, int64_t width) {
  const int64_t bytes = dtype == Float::f32 ? sizeof(float) : sizeof(uint16_t);
  const char* row = static_cast<const char*>(y) + at * bytes;
  for (int i = 0; i < rows; ++i, row += pitch * bytes) {
    for (int64_t j = 0; j < width * bytes; j += 64) __builtin_prefetch(row + j, 1);
  }
}

// Whether multiply() of a Tile unpacks the weights; out of a table of 64 levels it is worth it for few rows alone.
template <class Tile>
bool multiplies_stored(const Activations& a, const PackedWeight& w, int64_t first, int64_t last) {
  const bool cheap = w.levels == nullptr || w.bits <= 4 || last - first <= kFewRows;
  return w.bits < 8 && cheap && Tile::unpacks(a.codes + first * a.row_bytes, last - first);
}

// The most groups to multiply before the next rows; what was unpacked should stay in the first cache for few of them.
template <class Tile>
int64_t depth_block(const PackedWeight& w, int64_t rows, bool as_stored) {
  constexpr int64_t kFew = Tile::kDepthBlockFew < 64 ? Tile::kDepthBlockFew : 64;
  static_assert(Tile::kDepthBlock <= kUnpackedGroups);
  return rows > Tile::kRows ? Tile::kDepthBlock : w.bits == 8 || as_stored ? Tile::kDepthBlockFew : kFew;
}

template <class Tile>
void multiply(const Activations& a, const PackedWeight& w, void* y, Float dtype, int64_t first, int64_t last,
              int64_t panel, uint8_t* scratch) {
  const int64_t groups = w.groups(), depth = w.depth();
  Panel weights(w, panel, scratch);
  int32_t* block_sums = reinterpret_cast<int32_t*>(scratch + kUnpackedGroups * kGroupBytes);
  const Epilogue epilogue(w, panel);
  const bool as_stored = multiplies_stored<Tile>(a, w, first, last);
  // Equal blocks, so that a tail never becomes a tiny last one.
  const int64_t limit = depth_block<Tile>(w, last - first, as_stored);
  const int64_t blocks = (groups + limit - 1) / limit;
  const int64_t block = blocks > 0 ? ((groups + blocks - 1) / blocks + kSpan - 1) / kSpan * kSpan : 0;
  // Whole bytes follow the stored weights where channels are split.
  const int64_t kept_sums = blocks > 1 || (as_stored && w.tail > 0) ? Tile::kRows * kPanel : 0;
  int64_t g = 0;
  do {
    int64_t length = groups - g < block ? groups - g : block;
    Block part = weights.block(g, length, as_stored);
    length = part.groups;
    int32_t* sums = block_sums;
    for (int64_t m = first; m < last; m += Tile::kRows) {
      const int rows = static_cast<int>(last - m < Tile::kRows ? last - m : Tile::kRows);
      if (g + length == groups) {
        const int64_t at = m * w.n + panel * kPanel;
        fetch_output(y, dtype, w.n, at, rows, epilogue.width);
        if (w.residual != 0) fetch_output(y, dtype, w.n, at + w.residual, rows, epilogue.width);
      }
      Tile::multiply(rows, a.codes + m * a.row_bytes, depth, part, sums);
      part.next = nullptr;
      if (g + length == groups) finish<Tile>(a, w, epilogue, weights.stored(), m, rows, sums, y, dtype, panel);
      sums += kept_sums;
    }
    g += length;
  } while (g < groups);
}

}  // namespace
}  // namespace ocsquant
