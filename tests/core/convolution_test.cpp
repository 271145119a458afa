// Planes, patches and their products of every level against the definition, bit for bit, between guard pages.
#include "core/pack.h"
#include "oracle.h"
#include "tests.h"

namespace coretest {
namespace {

using ocsquant::PackedWeight;
using ocsquant::PatchShape;

// One sample, channels first and last, and what its convolution must give.
struct Picture {
  PatchShape s;
  std::vector<float> first, last;     // [channels][pixels], [pixels][channels]
  std::vector<float> inverse, shift;  // of a fixed step, repeated for a period of pixels
  ocsquant::TokenQuantizer how;

  explicit Picture(Random& r) {
    const auto up_to = [&](int64_t n) { return static_cast<int64_t>(1 + r.below(n)); };
    s = {up_to(40),    up_to(9),     up_to(9), up_to(3), up_to(3), up_to(2), up_to(2),
         up_to(3) - 1, up_to(3) - 1, up_to(2), up_to(2), 1,        1};
    s.height = std::max(s.height, s.dilation_h * (s.kernel_h - 1) + 1 - 2 * s.padding_h);
    s.width = std::max(s.width, s.dilation_w * (s.kernel_w - 1) + 1 - 2 * s.padding_w);
    s.out_h = (s.height + 2 * s.padding_h - s.dilation_h * (s.kernel_h - 1) - 1) / s.stride_h + 1;
    s.out_w = (s.width + 2 * s.padding_w - s.dilation_w * (s.kernel_w - 1) - 1) / s.stride_w + 1;
    static constexpr int kOutliers[] = {0, 1, 16, 64};
    static constexpr int kBits[] = {8, 8, 6, 4};
    how = {kBits[r.below(4)], kOutliers[r.below(4)], 2.0f + r.uniform() * 3.0f};
    if (r.below(2) == 0) fix_step(r);
    first.resize(s.values());
    last.resize(s.values());
    const uint64_t kind = r.below(3);
    for (float& v : first) {
      v = r.gauss() * (r.below(30) == 0 ? 40.0f : 1.0f);
      if (kind == 0) v = std::max(v, 0.0f);
      if (kind == 1 && r.below(500) == 0) v = float_of(r.below(2) == 0 ? 0x7f800000 : 0x7fc00000);
    }
    for (int64_t c = 0; c < s.channels; ++c) {
      for (int64_t p = 0; p < s.pixels(); ++p) last[p * s.channels + c] = first[c * s.pixels() + p];
    }
  }
  // In moving, the pointers must follow the vectors.
  Picture(const Picture&) = delete;
  Picture& operator=(const Picture&) = delete;

 private:
  void fix_step(Random& r) {
    how.fixed = true;
    const int64_t period = ocsquant::pixel_period(s.channels);
    const float beyond = r.below(4) == 0 ? r.below(2) == 0 ? 500.0f : 5e7f : 1.0f;  // 16 or 32 bits
    for (std::vector<float>* v : {&inverse, &shift}) {
      v->resize(period * s.channels);
      for (int64_t c = 0; c < s.channels; ++c) (*v)[c] = v == &shift ? r.gauss() : 20.0f + 40.0f * r.uniform();
      if (v == &inverse) (*v)[r.below(s.channels)] *= beyond;
      for (size_t i = s.channels; i < v->size(); ++i) (*v)[i] = (*v)[i - s.channels];
    }
    how.inverse = inverse.data();
    if (r.below(2) == 0) how.shift = shift.data();
  }
};

// The patches of the codes of a plane, [rows][depth].
std::vector<int32_t> patches(const Picture& picture, const int16_t* plane) {
  const PatchShape& s = picture.s;
  std::vector<int32_t> codes;
  for (int64_t row = 0; row < s.rows(); ++row) {
    for (int64_t ky = 0; ky < s.kernel_h; ++ky) {
      for (int64_t kx = 0; kx < s.kernel_w; ++kx) {
        const int64_t iy = row / s.out_w * s.stride_h - s.padding_h + ky * s.dilation_h;
        const int64_t ix = row % s.out_w * s.stride_w - s.padding_w + kx * s.dilation_w;
        const bool inside = iy >= 0 && iy < s.height && ix >= 0 && ix < s.width;
        for (int64_t c = 0; c < s.channels; ++c) {
          codes.push_back(inside ? plane[(iy * s.width + ix) * s.channels + c] : 0);
        }
      }
    }
  }
  return codes;
}

class Rig {
 public:
  void run(Level& level, const Picture& picture, const Weight& weight, Side side, int64_t seed) {
    const PatchShape& s = picture.s;
    Case c(level,
           "convolution %ld: %ld channels %ld x %ld, kernel %ld x %ld, outliers %d, weights of %d bits, groups of %ld",
           long(seed), long(s.channels), long(s.height), long(s.width), long(s.kernel_h), long(s.kernel_w),
           picture.how.max_outliers, weight.bits, long(weight.group));
    const auto& kernels = level.kernels->convolution;
    std::vector<int16_t> codes[2];
    float steps[2];
    for (const bool last : {false, true}) {
      const std::vector<float>& values = last ? picture.last : picture.first;
      const ocsquant::PlaneBounds bounds = ocsquant::plane_bounds(s.depth(), weight.e);
      steps[last] = codes_of(values.data(), s, !last, picture.how, bounds, codes[last]);
      const float* x = x_arena_.copy(values.data(), s.values(), side);
      float* scratch = scratch_arena_.place<float>(ocsquant::kPlanePixels * s.channels, side);
      const ocsquant::Planes planes = {nullptr, kernels.plane_bytes(s, picture.how.max_outliers), &steps[last]};
      uint8_t* plane = plane_arena_.place<uint8_t>(planes.bytes, side);
      const float step = kernels.quantize_plane(x, s, !last, picture.how, bounds, scratch, plane);
      c.check(scratch_arena_.intact() && plane_arena_.intact(), "bytes beside an operand were written");
      c.check(same(step, steps[last]), "the step is %a, not %a", double(step), double(steps[last]));
      multiply(level, c, picture, {plane, planes.bytes, &steps[last]}, codes[last].data(), weight, side);
      if (s.channels == 1 && weight.group == 0) convolve(level, c, picture, codes[last].data(), weight, side);
    }
    // The order of the values may change the last bit of the step, and with it codes; where it does not, nothing else
    // may.
    if (same(steps[0], steps[1])) {
      const bool equal = std::equal(codes[0].data(), codes[0].data() + s.values(), codes[1].data());
      c.check(equal, "the codes of the two layouts differ");
    }
  }

 private:
  // The plain C++ kernels keep a sample as it is defined.
  static float codes_of(const float* x, const PatchShape& s, bool channels_first, const ocsquant::TokenQuantizer& how,
                        const ocsquant::PlaneBounds& bounds, std::vector<int16_t>& codes) {
    const auto& kernels = ocsquant::kScalar.convolution;
    codes.resize(kernels.plane_bytes(s, how.max_outliers) / static_cast<int64_t>(sizeof(int16_t)));
    std::vector<float> scratch(ocsquant::kPlanePixels * s.channels);
    return kernels.quantize_plane(x, s, channels_first, how, bounds, scratch.data(),
                                  reinterpret_cast<uint8_t*>(codes.data()));
  }

  void multiply(Level& level, Case& c, const Picture& picture, const ocsquant::Planes& planes, const int16_t* codes,
                const Weight& weight, Side side) {
    const PatchShape& s = picture.s;
    const auto& linear = level.kernels->linear;
    PackedWeight w = {nullptr, weight.n,     weight.k,   weight.e, weight.index.data(), weight.scale.data(),
                      nullptr, weight.group, weight.bits};
    w.nonlinearity = weight.nonlinearity;
    if (!weight.bias.empty()) w.bias = weight.bias.data();
    if (!weight.zero.empty()) w.zero = weight.zero.data();
    if (!weight.levels.empty()) w.levels = weight.levels.data();
    uint8_t* packed = packed_arena_.place<uint8_t>(w.panels() * w.panel_bytes(), side);
    ocsquant::pack_panels(weight.codes.data(), weight.e > 0 ? weight.tail.data() : nullptr, w, packed);
    w.packed = packed;
    const int64_t most = level.kernels->convolution.largest_outliers(planes.first, s);
    const int64_t rests = std::min(most * s.kernel_h * s.kernel_w, s.depth()), rows = s.rows();
    const int64_t row_bytes = linear.row_bytes(w.depth()), groups = rows * w.scale_groups();
    const int64_t capacity = linear.rest_capacity(w.depth(), static_cast<int>(rests));
    const ocsquant::Activations a = {codes_arena_.place<uint8_t>(rows * row_bytes, side),
                                     step_arena_.place<float>(rows, side),
                                     rest_arena_.place<ocsquant::Rest>(rows * capacity, side),
                                     count_arena_.place<int32_t>(rows, side),
                                     offset_arena_.place<int32_t>(rows, side),
                                     w.group_channels > 0 ? group_arena_.place<int32_t>(groups, side) : nullptr,
                                     rows,
                                     row_bytes,
                                     capacity};
    void* scratch = rows_arena_.place<uint8_t>(ocsquant::quantize_scratch_bytes(w, linear.row_tile), side);
    level.kernels->convolution.place_patches(planes, s, 0, w, a, rows, scratch);
    float* y = y_arena_.place<float>(rows * w.n, side);
    const int64_t sums = ocsquant::kUnpackedGroups * ocsquant::kGroupBytes;
    for (int64_t first = 0; first < rows; first += linear.row_block) {
      const int64_t halves = w.group_channels > 0 ? 2 : 1;
      const int64_t bytes = halves * linear.row_block * ocsquant::kPanel * static_cast<int64_t>(sizeof(int32_t));
      uint8_t* room = sums_arena_.place<uint8_t>(sums + bytes, side);
      for (int64_t panel = 0; panel < w.panels(); ++panel) {
        (w.group_channels > 0 ? linear.multiply_groups : linear.multiply)(
            a, w, y, ocsquant::Float::f32, first, std::min(rows, first + linear.row_block), panel, room);
      }
    }
    std::vector<float> want;
    const bool exact =
        coretest::linear(patches(picture, codes), std::vector<float>(rows, *planes.step), weight, {}, want);
    c.check(exact, "sums of a plane's codes leave int32");
    for (size_t i = 0; i < want.size(); ++i) {
      if (same(y[i], want[i])) continue;
      c.check(false, "y[%ld] is %a, not %a", long(i), double(y[i]), double(want[i]));
      break;
    }
    if (a.group_offset_codes != nullptr) c.check(group_arena_.intact(), "bytes beside the groups' sums were written");
    for (const Arena* arena : {&codes_arena_, &step_arena_, &rest_arena_, &count_arena_, &offset_arena_, &y_arena_,
                               &rows_arena_, &sums_arena_}) {
      c.check(arena->intact(), "bytes beside an operand were written");
    }
  }

  // The same without tiles.
  void convolve(Level& level, Case& c, const Picture& picture, const int16_t* codes, const Weight& weight, Side side) {
    const PatchShape& s = picture.s;
    const auto& kernels = level.kernels->convolution;
    const ocsquant::PlaneBounds bounds = ocsquant::plane_bounds(s.depth(), weight.e);
    const float* x = x_arena_.copy(picture.first.data(), s.values(), side);
    uint8_t* plane = plane_arena_.place<uint8_t>(kernels.channel_bytes(s, picture.how.max_outliers), side);
    const float step = kernels.quantize_channel(x, s, false, picture.how, bounds, nullptr, plane);
    std::vector<float> want;
    coretest::linear(patches(picture, codes), std::vector<float>(s.rows(), step), weight, {}, want);
    std::vector<int32_t> taps(weight.codes.begin(), weight.codes.end());
    for (int64_t j = 0; j < weight.n; ++j) {
      for (int64_t e = 0; e < weight.e; ++e) taps[j * weight.k + weight.index[e]] += weight.tail[j * weight.e + e];
    }
    void* scratch = rows_arena_.place<uint8_t>(kernels.channel_scratch_bytes(s), side);
    std::vector<float> y(s.rows() + 16);
    for (int64_t j = 0; j < weight.n; ++j) {
      kernels.convolve_channel(plane, s, taps.data() + j * weight.k, step * weight.scale[j],
                               weight.bias.empty() ? nullptr : &weight.bias[j], scratch, y.data());
      level.kernels->nonlinear(weight.nonlinearity, s.rows(), y.data());
      for (int64_t i = 0; i < s.rows(); ++i) {
        if (same(y[i], want[i * weight.n + j])) continue;
        c.check(false, "y[%ld] of output %ld is %a, not %a", long(i), long(j), double(y[i]),
                double(want[i * weight.n + j]));
        break;
      }
    }
    c.check(plane_arena_.intact() && rows_arena_.intact(), "bytes beside an operand were written");
  }

  Arena x_arena_, scratch_arena_, plane_arena_, packed_arena_, codes_arena_, step_arena_, rest_arena_, count_arena_,
      offset_arena_, rows_arena_, y_arena_, sums_arena_, group_arena_;
};

void check_transpose(Level& level, Random& r, Side side) {
  const int64_t rows = static_cast<int64_t>(1 + r.below(40)), columns = static_cast<int64_t>(1 + r.below(40));
  Case c(level, "transpose %ld x %ld", long(rows), long(columns));
  Arena from_arena, to_arena;
  std::vector<float> values(rows * columns);
  for (float& v : values) v = r.gauss();
  const float* from = from_arena.copy(values.data(), rows * columns, side);
  float* to = to_arena.place<float>(rows * columns, side);
  level.kernels->convolution.transpose(from, columns, rows, columns, to, rows);
  bool right = true;
  for (int64_t i = 0; i < rows * columns; ++i) right = right && to[i % columns * rows + i / columns] == values[i];
  c.check(right && to_arena.intact(), "it is something else");
}

}  // namespace

void test_convolution(std::vector<Level>& levels, int64_t every) {
  Rig rig;
  for (int64_t seed = 0; seed < 2000; seed += every > 1 ? 5 : 1) {
    Random r(mix(seed, 77, 3));
    const Picture picture(r);
    Weight weight;
    static constexpr int64_t kOutputs[] = {1, 7, 64, 70};
    const int64_t depth = picture.s.depth(), tail = r.below(3) == 0 ? std::min<int64_t>(depth, 5) : 0;
    make_weight(kOutputs[r.below(4)], depth, tail, mix(seed, 78, 3), -1, weight);
    const Side side = seed % 2 == 0 ? Side::end : Side::start;
    for (Level& level : levels) {
      if (!level.usable) continue;
      rig.run(level, picture, weight, side, seed);
      check_transpose(level, r, side);
    }
  }
}

}  // namespace coretest
