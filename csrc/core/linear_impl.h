// The quantized linear, written once over Simd and a Tile (the integer micro-kernel of one instruction set). Included
// inside a target region. Tile provides:
//   Code           what one activation code is stored as
//   kRows          rows of a tile; kUnsigned: codes are stored + 128, and 128 * column sum is taken off again
//   place(codes, rows, depth, out, rests, counts, capacity)   row-major int16 codes to [depth/4][rows][4] Code
//   multiply(rows, a, block, sums)   sums[row][64] (+)= a * block for the columns below block.width
//   add_rest(rest, group, sums)                                sums[64] += rest.value * (column rest.k of the panel)
#pragma once

namespace ocsquant {
namespace {

// A run of groups of one panel.
struct Block {
  const int8_t* weights;
  int64_t groups;
  int64_t width;  // columns that exist
  int64_t ahead;  // bytes to the weights that will be needed next, to be fetched into the cache; 0: none
  bool first;     // start the sums instead of adding to them
};

template <class Tile>
void quantize(const void* x, Float dtype, const TokenQuantizer& how, const PackedWeight& w, const Activations& a,
              int64_t first, int64_t last, void* scratch) {
  const int64_t depth = w.depth(), base = (w.k + kGroup - 1) / kGroup * kGroup;
  // A row's codes are written in blocks of 64, the tail then over what lies beyond the base.
  const int64_t pitch = (w.k + 63) / 64 * 64 + (depth - base);
  int16_t* codes = static_cast<int16_t*>(scratch);
  float* wide = reinterpret_cast<float*>(codes + (Tile::kRows * pitch + 31) / 32 * 32);
  for (int64_t m = first; m < last; m += Tile::kRows) {
    const int rows = static_cast<int>(last - m < Tile::kRows ? last - m : Tile::kRows);
    for (int i = 0; i < rows; ++i) {
      const float* row;
      if (dtype == Float::bf16) {
        widen(static_cast<const uint16_t*>(x) + (m + i) * w.k, w.k, wide);
        row = wide;
      } else {
        row = static_cast<const float*>(x) + (m + i) * w.k;
      }
      int16_t* out = codes + i * pitch;
      a.step[m + i] = quantize_row(row, w.k, how, out);
      for (int64_t e = 0; e < w.tail; ++e) out[base + e] = out[w.tail_index[e]];
      for (int64_t e = base + w.tail; e < depth; ++e) out[e] = 0;
    }
    Tile::place(codes, pitch, rows, depth, reinterpret_cast<typename Tile::Code*>(a.codes) + m * depth,
                a.rests + m * a.rest_capacity, a.rest_count + m, a.rest_capacity);
  }
}

// Scale and bias of one panel, padded to 64 columns.
struct Epilogue {
  const float* scale;
  const float* bias;
  const int32_t* column_sum;
  int64_t width;
  float edge_scale[kPanel], edge_bias[kPanel];

  OCSQ_INLINE Epilogue(const PackedWeight& w, int64_t panel, const int8_t* sums) {
    const int64_t n0 = panel * kPanel;
    width = w.n - n0 < kPanel ? w.n - n0 : kPanel;
    scale = w.scale + n0;
    bias = w.bias != nullptr ? w.bias + n0 : nullptr;
    column_sum = reinterpret_cast<const int32_t*>(sums);
    if (width < kPanel) {
      std::memset(edge_scale, 0, sizeof(edge_scale));
      std::memcpy(edge_scale, scale, width * sizeof(float));
      scale = edge_scale;
      if (bias != nullptr) {
        std::memset(edge_bias, 0, sizeof(edge_bias));
        std::memcpy(edge_bias, bias, width * sizeof(float));
        bias = edge_bias;
      }
    }
  }

  template <bool kUnsigned>
  OCSQ_INLINE void columns(const int32_t* sums, float step, float* y) const {
    const Simd::F t = Simd::set1(step);
    for (int64_t j = 0; j < width; j += Simd::W) {
      Simd::I sum = Simd::load_i(sums + j);
      if constexpr (kUnsigned) sum = Simd::sub_i(sum, Simd::shift_left_7(Simd::load_i(column_sum + j)));
      Simd::F v = Simd::mul(Simd::to_float(sum), Simd::mul(t, Simd::load(scale + j)));
      if (bias != nullptr) v = Simd::add(v, Simd::load(bias + j));
      Simd::store(y + j, v);
    }
  }

  template <bool kUnsigned>
  OCSQ_INLINE void row(const int32_t* sums, float step, void* y, Float dtype, int64_t offset) const {
    if (dtype == Float::f32 && width == kPanel) {
      columns<kUnsigned>(sums, step, static_cast<float*>(y) + offset);
      return;
    }
    float block[kPanel];
    columns<kUnsigned>(sums, step, block);
    if (dtype == Float::f32) {
      std::memcpy(static_cast<float*>(y) + offset, block, width * sizeof(float));
    } else {
      narrow(block, width, static_cast<uint16_t*>(y) + offset);
    }
  }
};

// Kept out of multiply(): together they spill the accumulators of the inner loop (GCC 12).
template <class Tile>
__attribute__((noinline)) void finish(const Activations& a, const PackedWeight& w, const Epilogue& epilogue,
                                      const int8_t* base, int64_t m, int rows, int32_t* sums, void* y, Float dtype,
                                      int64_t panel) {
  for (int i = 0; i < rows; ++i, sums += kPanel) {
    if constexpr (Tile::kUnsigned) {
      const Rest* rests = a.rests + (m + i) * a.rest_capacity;
      for (int32_t r = 0; r < a.rest_count[m + i]; ++r) {
        Tile::add_rest(rests[r], base + rests[r].k / kGroup * kGroupBytes, sums);
      }
    }
    epilogue.row<Tile::kUnsigned>(sums, a.step[m + i], y, dtype, (m + i) * w.n + panel * kPanel);
  }
}

template <class Tile>
void multiply(const Activations& a, const PackedWeight& w, void* y, Float dtype, int64_t first, int64_t last,
              int64_t panel, int32_t* scratch) {
  const int64_t groups = w.groups(), depth = w.depth();
  const int8_t* base = w.packed + panel * w.panel_bytes();
  const Epilogue epilogue(w, panel, base + groups * kGroupBytes);
  const typename Tile::Code* codes = reinterpret_cast<const typename Tile::Code*>(a.codes);
  // Equal blocks, so that a tail never becomes a tiny last one.
  const int64_t limit = last - first <= Tile::kRows ? Tile::kDepthBlockFew : Tile::kDepthBlock;
  const int64_t blocks = (groups + limit - 1) / limit, block = blocks > 0 ? (groups + blocks - 1) / blocks : 0;
  int64_t g = 0;
  do {
    const int64_t length = groups - g < block ? groups - g : block;
    int32_t* sums = scratch;
    const int8_t* b = base + g * kGroupBytes;
    for (int64_t m = first; m < last; m += Tile::kRows) {
      const int rows = static_cast<int>(last - m < Tile::kRows ? last - m : Tile::kRows);
      const typename Tile::Code* tile = codes + m * depth + g * kGroup * rows;
      const int64_t ahead = m == first ? length * kGroupBytes : 0;
      Tile::multiply(rows, tile, Block{b, length, epilogue.width, ahead, g == 0}, sums);
      if (g + length == groups) finish<Tile>(a, w, epilogue, base, m, rows, sums, y, dtype, panel);
      if (blocks > 1) sums += Tile::kRows * kPanel;
    }
    g += length;
  } while (g < groups);
}

template <class Tile>
constexpr LinearKernels linear_kernels() {
  return {Tile::kRows,     sizeof(typename Tile::Code), Tile::kUnsigned,
          Tile::kRowBlock, Tile::kDepthBlock,           quantize<Tile>,
          multiply<Tile>};
}

constexpr FakeQuantizeKernels kFakeQuantize = {fake_quantize_forward, fake_quantize_backward};

}  // namespace
}  // namespace ocsquant
