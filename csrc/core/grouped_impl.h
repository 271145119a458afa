// The quantized linear with a scale for every group of input channels of an output: exact integer sums of each group,
// added in float32, the first group first. Included inside a target region, after linear_impl.h.
#pragma once

namespace ocsquant {
namespace {

template <class Tile>
class FewGroups;  // few_groups_impl.h

// One group's sums of R rows, times its scales, added to the rows' totals.
template <int R, bool kFirst>
OCSQ_INLINE void add_group_sums(const int32_t* sums, const int32_t* offset, const float* step, const float* scale,
                                int64_t width, float* totals) {
  Simd::F t[R];
  Simd::I o[R];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    t[i] = Simd::set1(step[i]);
    o[i] = Simd::set1_i(offset[i]);
  }
  for (int64_t j = 0; j < width; j += Simd::W) {
    const Simd::F of_columns = Simd::load(scale + j);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const Simd::F sum = Simd::to_float(Simd::sub_i(Simd::load_i(sums + i * kPanel + j), o[i]));
      const Simd::F v = Simd::mul(sum, Simd::mul(t[i], of_columns));
      float* total = totals + i * kPanel + j;
      Simd::store(total, kFirst ? v : Simd::add(Simd::load(total), v));
    }
  }
}

// Kept out of multiply_groups(), as finish() is of multiply().
template <class Tile>
__attribute__((noinline)) void finish_group(const Activations& a, const PackedWeight& w, const Epilogue& epilogue,
                                            const StoredPanel& weights, int64_t group, int64_t m, int rows,
                                            int32_t* sums, float* totals, int32_t* rests_done) {
  const int64_t end = (group + 1) * w.group_channels;
  RestRows rests;
  for (int i = 0; i < rows; ++i) {
    const Rest* all = a.rests + (m + i) * a.rest_capacity;
    const int32_t from = rests_done[i];
    int32_t to = from;
    while (to < a.rest_count[m + i] && all[to].k < end) ++to;
    rests.of[i] = all + from;
    rests.count[i] = to - from;
    rests_done[i] = to;
  }
  Tile::add_rests(rests, rows, weights, sums);
  int32_t offset[Tile::kRows];
  for (int i = 0; i < rows; ++i) {
    const int32_t codes = a.group_offset_codes[(m + i) * w.scale_groups() + group];
    offset[i] = static_cast<int32_t>(w.offset() * static_cast<uint32_t>(codes));
  }
  const float *step = a.step + m, *scale = epilogue.scale;
  if (rows == Tile::kRows) {
    group == 0 ? add_group_sums<Tile::kRows, true>(sums, offset, step, scale, epilogue.width, totals)
               : add_group_sums<Tile::kRows, false>(sums, offset, step, scale, epilogue.width, totals);
    return;
  }
  for (int i = 0; i < rows; ++i, sums += kPanel, totals += kPanel) {
    group == 0 ? add_group_sums<1, true>(sums, offset + i, step + i, scale, epilogue.width, totals)
               : add_group_sums<1, false>(sums, offset + i, step + i, scale, epilogue.width, totals);
  }
}

// Adds the bias, applies the nonlinearity, and stores.
inline void store_totals(const PackedWeight& w, void* y, Float dtype, int64_t first, int64_t last, int64_t panel,
                         float* totals) {
  const Epilogue epilogue(w, panel, w.scale_groups() - 1);
  for (int64_t m = first; m < last; ++m, totals += kPanel) {
    for (int64_t j = 0; j < epilogue.width && epilogue.bias != nullptr; j += Simd::W) {
      Simd::store(totals + j, Simd::add(Simd::load(totals + j), Simd::load(epilogue.bias + j)));
    }
    if (epilogue.nonlinearity != Nonlinearity::none) nonlinear(epilogue.nonlinearity, epilogue.width, totals);
    const int64_t at = m * w.n + panel * kPanel;
    if (dtype == Float::f32) {
      std::memcpy(static_cast<float*>(y) + at, totals, epilogue.width * sizeof(float));
    } else {
      narrow(totals, epilogue.width, static_cast<uint16_t*>(y) + at);
    }
  }
}

template <class Tile>
void multiply_groups(const Activations& a, const PackedWeight& w, void* y, Float dtype, int64_t first, int64_t last,
                     int64_t panel, uint8_t* scratch) {
  float* totals = reinterpret_cast<float*>(scratch + kUnpackedGroups * kGroupBytes);
  if constexpr (Tile::kFewGroups) {
    if (last - first <= kFewRows) {
      FewGroups<Tile>::multiply(a, w, first, static_cast<int>(last - first), panel, totals);
      return store_totals(w, y, dtype, first, last, panel, totals);
    }
  }
  const int64_t depth = w.depth(), count = w.scale_groups(), quads = w.groups(), per_group = w.group_channels / kGroup;
  Panel weights(w, panel, scratch);
  const bool as_stored = multiplies_stored<Tile>(a, w, first, last);
  const int64_t limit = depth_block<Tile>(w, last - first, as_stored);
  int32_t* group_sums = reinterpret_cast<int32_t*>(totals + Tile::kRowBlock * kPanel);
  int32_t rests_done[Tile::kRowBlock];
  std::memset(rests_done, 0, (last - first) * sizeof(int32_t));
  for (int64_t group = 0; group < count; ++group) {
    const Epilogue epilogue(w, panel, group);
    const int64_t begin = group * per_group, end = begin + per_group < quads ? begin + per_group : quads;
    for (int64_t q = begin, length; q < end; q += length) {
      Block part = weights.block(q, end - q < limit ? end - q : limit, as_stored);
      part.first = q == begin;
      length = part.groups;
      for (int64_t m = first; m < last; m += Tile::kRows) {
        const int rows = static_cast<int>(last - m < Tile::kRows ? last - m : Tile::kRows);
        const int64_t at = (m - first) * kPanel;
        Tile::multiply(rows, a.codes + m * a.row_bytes, depth, part, group_sums + at);
        part.next = nullptr;
        if (q + length < end) continue;
        finish_group<Tile>(a, w, epilogue, weights.stored(begin), group, m, rows, group_sums + at, totals + at,
                           rests_done + m - first);
      }
    }
  }
  store_totals(w, y, dtype, first, last, panel, totals);
}

template <class Tile>
constexpr LinearKernels linear_kernels() {
  return {Tile::kRows,    Tile::kRowBlock, Tile::row_bytes,      Tile::rest_capacity,
          quantize<Tile>, multiply<Tile>,  multiply_groups<Tile>};
}

}  // namespace
}  // namespace ocsquant
