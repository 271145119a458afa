// Weights of every width as a micro-kernel loads them, unpacked in registers: for few rows, which would use what is
// unpacked into memory only once, or where it costs nothing. Written once over a vector of bytes. Included inside a
// target region.
#pragma once

namespace ocsquant {
namespace {

// The most rows for which the 256-bit kernels unpack in registers, everybody out of a table of 64 levels, and group
// scales have a kernel of their own (few_groups_impl.h).
constexpr int64_t kFewRows = 4;

// What is between the stored numbers and the bytes to be multiplied.
enum class Mapping { none, shift, levels };

// Vec's bytes of a span (pack.h) of kBits: those of group g from `at` on. `map`: the shifts of those columns, or a
// table.
template <class Vec, int kBits, Mapping kMapping = Mapping::none>
struct Stored {
  static constexpr int64_t kSpanBytes = kSpan * kGroupBytes * kBits / 8;
  static constexpr bool kBytes = kBits == 8, kPerColumn = kMapping == Mapping::shift;
  using V = typename Vec::V;

  static OCSQ_INLINE V load(const uint8_t* span, int g, int at, const uint8_t* map) {
    const V code = number(span + at, g);
    if (kMapping == Mapping::shift) return Vec::add(code, Vec::load(map + at));
    if (kMapping == Mapping::levels) return kBits == 6 ? Vec::look_up64(map, code) : Vec::look_up(map, code);
    return code;
  }

 private:
  static OCSQ_INLINE V number(const uint8_t* span, int g) {
    if (kBits == 8) return Vec::load(span + g * kGroupBytes);
    if (kBits == 2) return cut(Vec::load(span), 2 * g, 3);
    const V low = cut(Vec::load(span + g % 2 * kGroupBytes), g / 2 * 4, 15);
    if (kBits == 4) return low;
    const V plane = Vec::load(span + kSpan / 2 * kGroupBytes);
    return Vec::either(low, Vec::both(g < 2 ? Vec::up(plane, 4 - 2 * g) : Vec::down(plane, 2 * g - 4), Vec::all(0x30)));
  }

  static OCSQ_INLINE V cut(V plane, int down, int mask) { return Vec::both(Vec::down(plane, down), Vec::all(mask)); }
};

template <class Vec, int kBits, class Kernel, class... Args>
OCSQ_INLINE void run_mapped(Mapping mapping, const Args&... args) {
  switch (mapping) {
    case Mapping::none:
      return Kernel::template run<Stored<Vec, kBits>>(args...);
    case Mapping::shift:
      return Kernel::template run<Stored<Vec, kBits, Mapping::shift>>(args...);
    default:
      return Kernel::template run<Stored<Vec, kBits, Mapping::levels>>(args...);
  }
}

// Kernel::run<S>(args...) with the Stored of a block.
template <class Vec, class Kernel, class Block, class... Args>
OCSQ_INLINE void run_stored(const Block& block, const Args&... args) {
  switch (block.bits) {
    case 2:
      return run_mapped<Vec, 2, Kernel>(block.mapping, args...);
    case 4:
      return run_mapped<Vec, 4, Kernel>(block.mapping, args...);
    case 6:
      return run_mapped<Vec, 6, Kernel>(block.mapping, args...);
    default:
      return Kernel::template run<Stored<Vec, 8>>(args...);
  }
}

}  // namespace
}  // namespace ocsquant
