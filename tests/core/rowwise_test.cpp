// The bf16 conversions, weights that are stored as codes, the packing and the choice of a level.
#include <cstring>
#include <map>

#include "core/pack.h"
#include "tests.h"

namespace coretest {
namespace {

using ocsquant::kGroup;
using ocsquant::kGroupBytes;
using ocsquant::kPanel;

constexpr Side kSides[] = {Side::end, Side::start};

}  // namespace

void test_dequantize(Level& level) {
  Arena packed_arena, scale_arena, zero_arena, levels_arena, y_arena;
  const int64_t sizes[] = {1, 7, 8, 9, 64, 100, 511, 512, 513, 1030};
  for (const int64_t k : sizes) {
    for (int bits = 2; bits <= 8; ++bits) {
      for (int turn = 0; turn < 6; ++turn) {  // none, zero points, levels; one group or several
        const int kind = turn % 3;
        if (kind == 2 && bits > ocsquant::kMaxLevelBits) continue;
        Random r(mix(k, bits, turn));
        const int64_t n = 3, group = turn < 3 ? k : 1 + r.below(k), entries = 1 + r.below(1 << bits);
        const int64_t books = r.below(2) == 0 ? 1 : n;
        ocsquant::CodedWeight w = {nullptr, n, k, bits, group, nullptr, nullptr, nullptr, books, entries};
        std::vector<uint8_t> codes(n * k), packed(n * w.row_bytes());
        for (uint8_t& c : codes) c = static_cast<uint8_t>(r.below(1 << bits));
        for (int64_t i = 0; i < n; ++i) {
          ocsquant::pack_codes(codes.data() + i * k, k, bits, packed.data() + i * w.row_bytes());
        }
        std::vector<float> scale(n * w.groups()), zero(n * w.groups());
        std::vector<int8_t> levels(books * entries);
        for (float& s : scale) s = std::ldexp(1.0f + r.uniform(), static_cast<int>(r.below(40)) - 20);
        for (float& z : zero) z = static_cast<float>(r.below(1 << bits));
        for (int8_t& l : levels) l = static_cast<int8_t>(r.below(255) - 127);
        for (const Side side : kSides) {
          Case c(level, "dequantize k %ld bits %d turn %d", long(k), bits, turn);
          w.packed = packed_arena.copy(packed.data(), packed.size(), side);
          w.scale = scale_arena.copy(scale.data(), scale.size(), side);
          w.zero = kind == 1 ? zero_arena.copy(zero.data(), zero.size(), side) : nullptr;
          w.levels = kind == 2 ? levels_arena.copy(levels.data(), levels.size(), side) : nullptr;
          float* y = y_arena.place<float>(k, side);
          for (int64_t i = 0; i < n; ++i) {
            level.kernels->dequantize_row(w, i, y);
            for (int64_t j = 0; j < k; ++j) {
              const int64_t at = i * w.groups() + j / group, code = codes[i * k + j];
              const float middle = kind == 1 ? zero[at] : static_cast<float>(1 << (bits - 1));
              const int64_t book = books == 1 ? 0 : i;
              const float number = kind != 2        ? static_cast<float>(code) - middle
                                   : code < entries ? static_cast<float>(levels[book * entries + code])
                                                    : 0.0f;
              const float value = number * scale[at];
              if (!same(y[j], value)) c.check(false, "y[%ld] is %a, not %a", long(j), double(y[j]), double(value));
            }
          }
        }
      }
    }
  }
}

void test_conversions(Level& level) {
  Arena wide_arena, narrow_arena;
  const auto widen = [&](const std::vector<uint16_t>& values, Side side) {
    const int64_t n = static_cast<int64_t>(values.size());
    Case c(level, "widen %ld", long(n));
    const uint16_t* x = narrow_arena.copy(values.data(), n, side);
    float* y = wide_arena.place<float>(n, side);
    level.kernels->widen(x, n, y);
    for (int64_t j = 0; j < n; ++j) {
      const uint32_t want = static_cast<uint32_t>(values[j]) << 16;  // NaN payloads too
      if (bits_of(y[j]) != want) c.check(false, "[%ld] is %08x, not %08x", long(j), bits_of(y[j]), want);
    }
    c.check(wide_arena.intact(), "bytes beside the output were written");
  };
  const auto narrow = [&](const std::vector<float>& values, Side side) {
    const int64_t n = static_cast<int64_t>(values.size());
    Case c(level, "narrow %ld", long(n));
    const float* x = wide_arena.copy(values.data(), n, side);
    uint16_t* y = narrow_arena.place<uint16_t>(n, side);
    level.kernels->narrow(x, n, y);
    for (int64_t j = 0; j < n; ++j) {
      const uint16_t want = to_bf16(values[j]);
      if (y[j] != want) c.check(false, "[%ld] of %08x is %04x, not %04x", long(j), bits_of(values[j]), y[j], want);
    }
    c.check(narrow_arena.intact(), "bytes beside the output were written");
  };

  std::vector<uint16_t> halves(65536);
  for (size_t j = 0; j < halves.size(); ++j) halves[j] = static_cast<uint16_t>(j);
  std::vector<float> floats(65536);
  Random r(7);
  for (const Side side : kSides) {
    widen(halves, side);
    for (const uint32_t low : {0x0000u, 0x0001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
      for (uint32_t j = 0; j < 65536; ++j) floats[j] = float_of(j << 16 | low);
      narrow(floats, side);
    }
    for (auto& v : floats) v = float_of(static_cast<uint32_t>(r.next()));
    narrow(floats, side);
    for (int64_t n = 0; n <= 300; ++n) {
      widen(std::vector<uint16_t>(halves.begin() + 16000, halves.begin() + 16000 + n), side);
      narrow(std::vector<float>(floats.begin() + 300 * n % 30000, floats.begin() + 300 * n % 30000 + n), side);
    }
  }
}

void test_packing(Level& level) {
  Arena codes_arena, tail_arena, packed_arena;
  Weight w;
  for (int64_t n : {0, 1, 2, 63, 64, 65, 127, 128, 129}) {
    for (int64_t k : {0, 1, 2, 3, 4, 5, 63, 64, 65, 130}) {
      for (int64_t e : {0, 1, 3, 4, 5, 64}) {
        Case c(level, "pack n %ld k %ld e %ld", long(n), long(k), long(e));
        make_weight(n, k, e, mix(n, k, e), kWithMinus128, w);
        const Side side = kSides[(n + k + e) % 2];
        ocsquant::PackedWeight shape = {nullptr, n, k, e, nullptr, nullptr, nullptr};
        const int64_t groups = (k + 3) / 4 + (e + 3) / 4, panels = (n + kPanel - 1) / kPanel;
        const int64_t panel_bytes = (groups + (groups + 1023) / 1024) * kGroupBytes, bytes = panels * panel_bytes;
        c.check(shape.panel_bytes() == panel_bytes, "panel_bytes is %ld", long(shape.panel_bytes()));
        const int8_t* codes = codes_arena.copy(w.codes.data(), n * k, side);
        const int8_t* tail = e > 0 ? tail_arena.copy(w.tail.data(), n * e, side) : nullptr;
        uint8_t* packed = packed_arena.place<uint8_t>(bytes, side);
        ocsquant::pack_panels(codes, tail, shape, packed);
        c.check(packed_arena.intact(), "bytes beside packed were written");

        // The layout of pack.h, entry by entry: panel, group, column, channel within the group.
        std::vector<uint8_t> want(bytes, 128);
        for (int64_t i = 0; i < panels; ++i) {
          std::fill_n(want.begin() + i * panel_bytes + groups * kGroupBytes, panel_bytes - groups * kGroupBytes, 0);
        }
        for (int64_t j = 0; j < n; ++j) {
          uint8_t* panel = want.data() + j / kPanel * panel_bytes;
          std::map<int64_t, int> squares;  // by the span and which of its column's two lanes
          for (int64_t p = 0; p < k + e; ++p) {
            const int64_t at = p < k ? p : (k + kGroup - 1) / kGroup * kGroup + p - k;
            const int8_t code = p < k ? w.codes[j * k + p] : w.tail[j * e + p - k];
            panel[(at / kGroup * kPanel + j % kPanel) * kGroup + at % kGroup] = static_cast<uint8_t>(code + 128);
            squares[at / 16 * 2 + at / 2 % 2] += code * code;
          }
          for (const auto& [lane, sum] : squares) {  // the smallest bound that is half the norm at least
            uint8_t& bound = panel[groups * kGroupBytes + lane / 2];
            while (4 * bound * bound < sum) ++bound;
          }
        }
        c.check(bytes == 0 || std::memcmp(packed, want.data(), bytes) == 0, "packed differs from the layout");

        shape.packed = packed_arena.copy(want.data(), bytes, side);
        int8_t* got_codes = codes_arena.place<int8_t>(n * k, side);
        int8_t* got_tail = tail_arena.place<int8_t>(n * e, side);
        ocsquant::unpack_panels(shape, got_codes, got_tail);
        c.check(n * k == 0 || std::memcmp(got_codes, w.codes.data(), n * k) == 0, "codes do not come back");
        c.check(n * e == 0 || std::memcmp(got_tail, w.tail.data(), n * e) == 0, "tail does not come back");
        c.check(codes_arena.intact() && tail_arena.intact(), "bytes beside the unpacked codes were written");
      }
    }
  }
}

// levels: those select_kernels knows, best first.
void test_selection(Level& level, const std::vector<Level>& levels) {
  const char* why = nullptr;
  const Level* best = nullptr;
  for (const Level& l : levels) {
    Case c(level, "select %s", l.name);
    why = nullptr;
    const ocsquant::Kernels* got = ocsquant::select_kernels(l.name, &why);
    c.check(got == (l.usable ? l.kernels : nullptr), "got %s", got != nullptr ? got->isa : "null");
    c.check(why != nullptr && *why != '\0', "no reason");
    c.check(std::strcmp(l.kernels->isa, l.name) == 0, "the table is called %s", l.kernels->isa);
    if (best == nullptr && l.usable) best = &l;
  }
  for (const char* any : {static_cast<const char*>(nullptr), ""}) {
    Case c(level, "select the best");
    why = nullptr;
    const ocsquant::Kernels* got = ocsquant::select_kernels(any, &why);
    c.check(got == best->kernels && why != nullptr && *why != '\0', "got %s", got != nullptr ? got->isa : "null");
  }
  for (const char* unknown : {"avx", "AVX2", "avx2 ", "avx51", "neon"}) {
    Case c(level, "select %s", unknown);
    why = nullptr;
    c.check(ocsquant::select_kernels(unknown, &why) == nullptr, "got a table");
    c.check(why != nullptr && *why != '\0', "no reason");
  }
}

}  // namespace coretest
