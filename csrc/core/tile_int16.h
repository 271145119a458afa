// Tiles of int16 codes, [depth/4][rows][4], for kernels that multiply 16-bit pairs: the code of an outlier needs no
// splitting there, the width of the operand holds body and rest together. Included inside a target region.
#pragma once

namespace ocsquant {
namespace {

// Rows of codes that are placed all together.
struct RowOut : CodesOut {
  OCSQ_INLINE RowOut(int16_t* all, int64_t pitch, const TileRows&, int row) : CodesOut{all + row * pitch} {}
  OCSQ_INLINE void expect(int64_t) {}
  OCSQ_INLINE void finish(int64_t) {}
};

inline void place_int16(const int16_t* codes, int64_t pitch, int64_t depth, int rows, int16_t* tile) {
  for (int64_t k = 0; k < depth; k += kGroup) {
    for (int i = 0; i < rows; ++i, tile += kGroup) std::memcpy(tile, codes + i * pitch + k, kGroup * sizeof(int16_t));
  }
}

// The codes of a sample as they are.
class CodesPlane {
 public:
  static int64_t bytes(const PatchShape& s, int) {
    return (s.plane_codes() * static_cast<int64_t>(sizeof(int16_t)) + 63) / 64 * 64;
  }
  struct Out : CodesOut {
    int16_t* all;
    Out(const PatchShape&, uint8_t* plane, int)
        : CodesOut{reinterpret_cast<int16_t*>(plane)}, all(reinterpret_cast<int16_t*>(plane)) {}
    OCSQ_INLINE void start(int64_t element) { codes = all + element; }
    OCSQ_INLINE void finish() {}
  };

  static int64_t largest_outliers(const uint8_t* plane, const PatchShape& s) {
    const int16_t* codes = reinterpret_cast<const int16_t*>(plane);
    int64_t most = 0;
    for (int64_t p = 0; p < s.pixels(); ++p, codes += s.channels) {
      int32_t count = 0;
      for (int64_t c = 0; c < s.channels; ++c) count += codes[c] > 127 || codes[c] < -128;
      if (count > most) most = count;
    }
    return most;
  }

  template <class Tile>
  static void place(const Planes& planes, const PatchShape& shape, int64_t row, const PackedWeight& w,
                    const Activations& a, int64_t rows, void* scratch) {
    place_rows<Tile>(Rows{planes, shape, row}, w, a, 0, rows, static_cast<int16_t*>(scratch));
  }

 private:
  struct Patch {
    const Planes& planes;
    int64_t channels;
    int16_t* out;
    const int16_t* codes;
    float step;
    OCSQ_INLINE void row(int64_t sample, int64_t) {
      codes = reinterpret_cast<const int16_t*>(planes.first + sample * planes.bytes);
      step = planes.step[sample];
    }
    OCSQ_INLINE void lines(int64_t at, int64_t pixel, int64_t pitch, int64_t count, int64_t width) const {
      for (int64_t i = 0; i < count; ++i, at += width * channels, pixel += pitch) {
        std::memcpy(out + at, codes + pixel * channels, width * channels * sizeof(int16_t));
      }
    }
    OCSQ_INLINE void zeros(int64_t at, int64_t count) const {
      std::memset(out + at, 0, count * channels * sizeof(int16_t));
    }
    OCSQ_INLINE void done() const {}
  };

  struct Rows {
    const Planes& planes;
    const PatchShape& shape;
    int64_t first;

    struct Prepared {};
    Prepared prepare(int64_t) const { return {}; }
    template <class Out>
    OCSQ_INLINE float put(int64_t m, Prepared, Out& out) const {
      Patch patch = {planes, shape.channels, out.codes, nullptr, 0.0f};
      for_patches(shape, first + m, 1, patch);
      return patch.step;
    }
  };
};

}  // namespace
}  // namespace ocsquant
