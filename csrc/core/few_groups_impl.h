// Group scales for few rows, where the parts of a product are so short that what is between them decides: all groups of
// a strip of columns in one go, sums and totals in registers, and no offset in the weights: what a group's zero points
// add is known from the sum of its activations. Included inside a target region, after grouped_impl.h and Tile, which
// provides
//   Vec, Factor                of RestSums
//   dot(sums, weights, x)      sums + products of unsigned weights and signed x, four to a sum
//   few_strip(rows)            vectors of columns whose sums and totals of that many rows fit the registers
//   fetch(p, lines, near), kPrefetch: how far ahead
#pragma once

namespace ocsquant {
namespace {

template <class Tile>
class FewGroups {
 public:
  static void multiply(const Activations& a, const PackedWeight& w, int64_t first, int rows, int64_t panel,
                       float* totals) {
    alignas(64) uint8_t table[kMaxEntries] = {};
    if (w.levels != nullptr) fill_table(w, table);
    const Numbers numbers = {w.bits, w.levels != nullptr ? Mapping::levels : Mapping::none};
    run_stored<typename Tile::Vec, FewGroups>(numbers, a, w, first, rows, panel, &table[0], totals);
  }

  template <class S>
  static void run(const Activations& a, const PackedWeight& w, int64_t first, int rows, int64_t panel,
                  const uint8_t* table, float* totals) {
    switch (rows) {
      case 1:
        return strips<1, S>(a, w, first, panel, table, totals);
      case 2:
        return strips<2, S>(a, w, first, panel, table, totals);
      case 3:
        return strips<3, S>(a, w, first, panel, table, totals);
      default:
        static_assert(kFewRows == 4);
        return strips<4, S>(a, w, first, panel, table, totals);
    }
  }

 private:
  struct Numbers {
    int bits;
    Mapping mapping;
  };

  template <int R, class S>
  static OCSQ_INLINE void strips(const Activations& a, const PackedWeight& w, int64_t first, int64_t panel,
                                 const uint8_t* table, float* totals) {
    constexpr int V = Tile::few_strip(R);
    const int64_t left = w.n - panel * kPanel;
    for (int64_t j = 0; j < kPanel && j < left; j += V * Simd::W) strip<R, V, S>(a, w, first, panel, j, table, totals);
  }

  // Columns [j, j + V * Simd::W) of a panel.
  template <int R, int V, class S>
  static __attribute__((noinline)) void strip(const Activations& a, const PackedWeight& w, int64_t first, int64_t panel,
                                              int64_t j, const uint8_t* table, float* totals) {
    constexpr int kBytes = Simd::W * kGroup;
    const uint8_t* weights = w.packed + panel * w.panel_bytes() + j * kGroup;
    CodeRows x = {a.codes + first * a.row_bytes, a.row_bytes};
    const Rest *rest[R], *end[R];
    for (int i = 0; i < R; ++i) {
      rest[i] = a.rests + (first + i) * a.rest_capacity;
      end[i] = rest[i] + a.rest_count[first + i];
    }
    const int64_t groups = w.scale_groups(), quads = w.group_channels / kGroup;
    Simd::F total[R][V];
    for (int64_t g = 0; g < groups; ++g) {
      // The sums of one row would wait for one another: below 8 bits every second quad has its own.
      Simd::I c[R][V], odd[R][V];
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) c[i][v] = odd[i][v] = Simd::zero_i();
      }
      const uint8_t* b = weights + bytes_before<S>(g * quads);
      const int64_t count = g + 1 < groups ? quads : w.groups() - g * quads;
      const auto add = [&](const uint8_t* from, int in_span, Simd::I(&sums)[R][V]) __attribute__((always_inline)) {
        Simd::I bytes[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) bytes[v] = S::load(from, in_span, kBytes * v, table);
#pragma GCC unroll 4
        for (int i = 0; i < R; ++i) {
          const Simd::I quad = Simd::set1_i(x.quad(i));
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) sums[i][v] = Tile::dot(sums[i][v], bytes[v], quad);
        }
        x.first += kGroup;
      };
      if constexpr (S::kBytes) {
        for (int64_t q = 0; q < count; ++q, b += kGroupBytes) {
          Tile::fetch(b + Tile::kPrefetch, kBytes * V / 64, true);
          add(b, 0, c);
        }
      } else {
        for (int64_t q = 0; q < count; q += kSpan, b += S::kSpanBytes) {
          for (int64_t plane = 0; plane < S::kSpanBytes; plane += kGroupBytes) {
            Tile::fetch(b + plane + Tile::kPrefetch, kBytes * V / 64, true);
          }
          add(b, 0, c);
          R == 1 ? add(b, 1, odd) : add(b, 1, c);
          add(b, 2, c);
          R == 1 ? add(b, 3, odd) : add(b, 3, c);
        }
#pragma GCC unroll 8
        for (int v = 0; v < V && R == 1; ++v) c[0][v] = Simd::add_i(c[0][v], odd[0][v]);
      }
      const int64_t beyond = (g + 1) * w.group_channels;
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        for (; rest[i] < end[i] && rest[i]->k < beyond; ++rest[i]) {
          const typename Tile::Factor factor(*rest[i]);
          const int64_t quad = static_cast<uint32_t>(rest[i]->k) / kGroup;
          const uint8_t* from = weights + bytes_before<S>(S::kBytes ? quad : quad / kSpan * kSpan);
#pragma GCC unroll 8
          for (int v = 0; v < V; ++v) {
            const Simd::I bytes = S::load(from, S::kBytes ? 0 : static_cast<int>(quad % kSpan), kBytes * v, table);
            c[i][v] = factor.add(c[i][v], bytes);
          }
        }
      }
      const Part part(w, panel, g, j, V * Simd::W);
#pragma GCC unroll 4
      for (int i = 0; i < R; ++i) {
        const int32_t codes = a.group_offset_codes[(first + i) * groups + g];
        const Simd::F step = Simd::set1(a.step[first + i]);
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) {
          const Simd::I offset = part.zero != nullptr
                                     ? Simd::mul_i(Simd::widen_bytes(part.zero + v * Simd::W), Simd::set1_i(codes))
                                     : Simd::set1_i(static_cast<int32_t>(offset_of(w) * static_cast<uint32_t>(codes)));
          const Simd::F sum = Simd::to_float(Simd::sub_i(c[i][v], offset));
          const Simd::F scaled = Simd::mul(sum, Simd::mul(step, Simd::load(part.scale + v * Simd::W)));
          total[i][v] = g == 0 ? scaled : Simd::add(total[i][v], scaled);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) Simd::store(totals + i * kPanel + j + v * Simd::W, total[i][v]);
    }
  }

  // What belongs to some columns of a group; copied where there are fewer of them.
  struct Part {
    const float* scale;
    const uint8_t* zero;
    float edge_scale[kPanel];
    uint8_t edge_zero[kPanel];

    OCSQ_INLINE Part(const PackedWeight& w, int64_t panel, int64_t g, int64_t j, int64_t columns) {
      const int64_t n0 = panel * kPanel + j, left = w.n - n0;
      scale = w.scale + g * w.n + n0;
      zero = w.zero != nullptr ? w.zero + g * w.n + n0 : nullptr;
      if (left >= columns) return;
      scale = padded(scale, left, edge_scale);
      if (zero != nullptr) zero = padded(zero, left, edge_zero);
    }
  };

  // Of a group of channels, the first of a span below 8 bits.
  template <class S>
  static constexpr int64_t bytes_before(int64_t group) {
    return S::kBytes ? group * kGroupBytes : group / kSpan * S::kSpanBytes;
  }

  // In the numbers as they are multiplied.
  static uint32_t offset_of(const PackedWeight& w) {
    return w.bits == 8 || w.levels != nullptr ? kOffset : 1u << (w.bits - 1);
  }
};

}  // namespace
}  // namespace ocsquant
