// quantize() and multiply() of every level against the definition, bit for bit, between guard pages.
#include <thread>

#include "core/pack.h"
#include "tests.h"

namespace coretest {
namespace {

using ocsquant::Activations;
using ocsquant::Float;
using ocsquant::kPanel;
using ocsquant::LinearKernels;
using ocsquant::PackedWeight;
using ocsquant::Rest;

// How the work is cut; whatever it is, the bits are the same.
struct Plan {
  Side side = Side::end;
  int64_t ranges = 1;       // of quantize()
  int64_t block_tiles = 0;  // row tiles of one multiply() call; 0: row_block rows, as the op does
  bool backwards = false;   // last block and panel first
  bool threads = false;     // two of them
  uint64_t residual = 0;    // the seed of what is added to float32 outputs; 0: nothing
};

Plan make_plan(uint64_t seed) {
  Random r(seed);
  Plan plan;
  if (r.below(4) == 0) plan.side = Side::start;
  if (r.below(3) == 0) plan.ranges = 2 + r.below(3);
  if (r.below(3) == 0) plan.block_tiles = 1 + r.below(3);
  plan.backwards = r.below(4) == 0;
  plan.residual = r.below(3) == 0 ? static_cast<uint64_t>(1 + r.below(1000)) : 0;
  return plan;
}

const char* text(Float dtype) { return dtype == Float::f32 ? "f32" : "bf16"; }

class Rig {
 public:
  // Inputs, once for all levels.
  void load(const Tokens& tokens, const Weight& weight, Float out, const Plan& plan) {
    tokens_ = &tokens;
    weight_ = &weight;
    out_ = out;
    plan_ = plan;
    const int64_t n = weight.n, k = weight.k, e = weight.e;
    x_ = tokens.dtype == Float::f32 ? static_cast<void*>(x_arena_.copy(tokens.x.data(), tokens.m * k, plan.side))
                                    : x_arena_.copy(tokens.x16.data(), tokens.m * k, plan.side);
    how_ = tokens.how;
    if (!tokens.inverse.empty()) how_.inverse = inverse_arena_.copy(tokens.inverse.data(), k, plan.side);
    if (!tokens.shift.empty()) how_.shift = shift_arena_.copy(tokens.shift.data(), k, plan.side);
    packed_ = {nullptr, n, k, e, nullptr, nullptr, nullptr, weight.group, weight.bits};
    packed_.nonlinearity = weight.nonlinearity;
    if (!weight.zero.empty()) packed_.zero = zero_arena_.copy(weight.zero.data(), weight.zero.size(), plan.side);
    if (!weight.levels.empty()) packed_.levels = levels_arena_.copy(weight.levels.data(), 64, plan.side);
    uint8_t* packed = packed_arena_.place<uint8_t>(packed_.panels() * packed_.panel_bytes(), plan.side);
    packs_ = ocsquant::pack_panels(weight.codes.data(), e > 0 ? weight.tail.data() : nullptr, packed_, packed) < 0;
    packed_.packed = packed;
    if (e > 0) packed_.tail_index = index_arena_.copy(weight.index.data(), e, plan.side);
    packed_.scale = scale_arena_.copy(weight.scale.data(), n * packed_.scale_groups(), plan.side);
    if (!weight.bias.empty()) packed_.bias = bias_arena_.copy(weight.bias.data(), n, plan.side);
    std::vector<int8_t> codes(n * k), tail(n * e);
    ocsquant::unpack_panels(packed_, codes.data(), tail.data());
    packs_ = packs_ && codes == weight.codes && tail == weight.tail;
    residual_.clear();
    if (plan.residual != 0 && out == Float::f32 && weight.group == 0) {
      Random r(plan.residual);
      residual_.resize(tokens.m * n);
      for (auto& v : residual_) v = r.gauss() * 3.0f;
    }
    exact_ = linear(tokens.codes, tokens.step, weight, residual_, expected_);
  }

  void run(Level& level) {
    Case c(level,
           "M %ld N %ld K %ld tail %ld groups of %ld, weights of %d bits%s, %s to %s, bits %d, outliers %d, threshold "
           "%g, fill %d%s%s%s, nonlinearity %d, "
           "ranges %ld, blocks "
           "%ld%s",
           long(tokens_->m), long(packed_.n), long(packed_.k), long(packed_.tail), long(packed_.group_channels),
           packed_.bits,
           packed_.zero     ? " from below"
           : packed_.levels ? " in a table"
                            : "",
           text(tokens_->dtype), text(out_), tokens_->how.bits, tokens_->how.max_outliers,
           double(tokens_->how.threshold), tokens_->fill,
           !how_.symmetric ? ", from below"
           : how_.fixed    ? ", fixed"
           : how_.inverse  ? ", folded"
                           : "",
           packed_.bias ? ", bias" : "", residual_.empty() ? "" : ", residual", int(packed_.nonlinearity),
           long(plan_.ranges), long(plan_.block_tiles), plan_.threads ? ", threads" : "");
    c.check(packs_, "the packed weight does not hold the codes");
    c.check(exact_, "the sum of the test itself does not fit int32");
    const LinearKernels& kernels = level.kernels->linear;
    place_outputs(kernels);
    quantize(kernels);
    check_rows(c);
    multiply(kernels);
    check_outputs(c);
  }

 private:
  void place_outputs(const LinearKernels& kernels) {
    const int64_t m = tokens_->m, row_bytes = kernels.row_bytes(packed_.depth());
    const int64_t capacity = kernels.rest_capacity(packed_.depth(), tokens_->how.max_outliers);
    const Side side = plan_.side;
    a_ = {codes_arena_.place<uint8_t>(m * row_bytes, side),
          step_arena_.place<float>(m, side),
          rest_arena_.place<Rest>(m * capacity, side),
          count_arena_.place<int32_t>(m, side),
          offset_arena_.place<int32_t>(m, side),
          packed_.group_channels > 0 ? group_arena_.place<int32_t>(m * packed_.scale_groups(), side) : nullptr,
          m,
          row_bytes,
          capacity};
    for (int t = 0; t < 2; ++t) {
      scratch_[t] = scratch_arena_[t].place<uint8_t>(ocsquant::quantize_scratch_bytes(packed_, kernels.row_tile), side);
      const int64_t halves = packed_.group_channels > 0 ? 2 : 1;
      const int64_t sums = halves * kernels.row_block * kPanel * sizeof(int32_t);
      sums_[t] = sums_arena_[t].place<uint8_t>(ocsquant::kUnpackedGroups * ocsquant::kGroupBytes + sums, side);
    }
    y_ = out_ == Float::f32 ? static_cast<void*>(y_arena_.place<float>(m * packed_.n, side))
                            : y_arena_.place<uint16_t>(m * packed_.n, side);
    packed_.residual = 0;
    if (residual_.empty()) return;
    const float* others = residual_arena_.copy(residual_.data(), m * packed_.n, side);
    const intptr_t distance = reinterpret_cast<intptr_t>(others) - reinterpret_cast<intptr_t>(y_);
    packed_.residual = distance / static_cast<intptr_t>(sizeof(float));
  }

  template <class Work>
  void on_threads(int64_t count, const Work& work) {
    const auto half = [&](int64_t first, int64_t last, int t) {
      for (int64_t i = first; i < last; ++i) work(i, t);
    };
    if (!plan_.threads) return half(0, count, 0);
    std::thread other(half, count / 2, count, 1);
    half(0, count / 2, 0);
    other.join();
  }

  void quantize(const LinearKernels& kernels) {
    const int64_t tiles = (tokens_->m + kernels.row_tile - 1) / kernels.row_tile;
    on_threads(plan_.ranges, [&](int64_t i, int t) {
      const int64_t first = tiles * i / plan_.ranges * kernels.row_tile;
      const int64_t last = std::min(tokens_->m, tiles * (i + 1) / plan_.ranges * kernels.row_tile);
      if (first < last) kernels.quantize(x_, tokens_->dtype, how_, packed_, a_, first, last, scratch_[t]);
    });
  }

  void multiply(const LinearKernels& kernels) {
    const int64_t rows = plan_.block_tiles > 0 ? plan_.block_tiles * kernels.row_tile : kernels.row_block;
    const int64_t panels = packed_.panels(), units = (tokens_->m + rows - 1) / rows * panels;
    on_threads(units, [&](int64_t i, int t) {
      const int64_t u = plan_.backwards ? units - 1 - i : i, first = u / panels * rows;
      const auto run = packed_.group_channels > 0 ? kernels.multiply_groups : kernels.multiply;
      run(a_, packed_, y_, out_, first, std::min(tokens_->m, first + rows), u % panels, sums_[t]);
    });
  }

  // The codes are each level's own affair: they are judged by the products, whose weights are of every kind.
  void check_rows(Case& c) {
    for (int64_t i = 0; i < tokens_->m; ++i) {
      c.check(same(a_.step[i], tokens_->step[i]), "step of row %ld is %a, not %a", long(i), double(a_.step[i]),
              double(tokens_->step[i]));
      const int32_t count = a_.rest_count[i];
      if (!c.check(count >= 0 && count <= a_.rest_capacity, "row %ld has %d rests", long(i), count)) return;
      for (int32_t r = 0; r < count; ++r) {
        const int32_t k = a_.rests[i * a_.rest_capacity + r].k;
        if (!c.check(k >= 0 && k < packed_.depth(), "row %ld has a rest at %d", long(i), k)) return;
      }
    }
  }

  void check_outputs(Case& c) {
    for (size_t i = 0; i < expected_.size(); ++i) {
      const float got = out_ == Float::f32 ? static_cast<float*>(y_)[i] : from_bf16(static_cast<uint16_t*>(y_)[i]);
      const float want = out_ == Float::f32 ? expected_[i] : from_bf16(to_bf16(expected_[i]));
      if (same(got, want)) continue;
      c.check(false, "y[%ld][%ld] is %a, not %a", long(i / packed_.n), long(i % packed_.n), double(got), double(want));
      break;
    }
    const Arena* written[] = {&codes_arena_, &step_arena_,       &rest_arena_,       &count_arena_,   &offset_arena_,
                              &y_arena_,     &scratch_arena_[0], &scratch_arena_[1], &sums_arena_[0], &sums_arena_[1]};
    for (const Arena* arena : written) c.check(arena->intact(), "bytes beside an operand were written");
    if (a_.group_offset_codes != nullptr) c.check(group_arena_.intact(), "bytes beside the groups' sums were written");
  }

  Arena x_arena_, inverse_arena_, shift_arena_, zero_arena_, levels_arena_, packed_arena_, scale_arena_, bias_arena_,
      index_arena_, y_arena_, codes_arena_, step_arena_, rest_arena_, count_arena_, offset_arena_, group_arena_,
      residual_arena_, scratch_arena_[2], sums_arena_[2];
  const Tokens* tokens_ = nullptr;
  const Weight* weight_ = nullptr;
  Float out_ = Float::f32;
  Plan plan_;
  PackedWeight packed_ = {};
  ocsquant::TokenQuantizer how_ = {};
  Activations a_ = {};
  void *x_ = nullptr, *y_ = nullptr, *scratch_[2] = {};
  uint8_t* sums_[2] = {};
  bool exact_ = false, packs_ = false;
  std::vector<float> residual_, expected_;
};

int64_t choose_tail(uint64_t seed, int64_t k) {
  static constexpr int64_t kSizes[] = {0, 0, 0, 1, 2, 3, 4, 5, 9, 1000};
  return std::min(k, kSizes[Random(seed).below(10)]);
}

// Every remainder of rows, columns and channels.
void small_shapes(std::vector<Level>& levels, Rig& rig, int64_t every) {
  Tokens tokens;
  Weight weight;
  for (int64_t k = 1; k <= 136; ++k) {
    for (int64_t m = 1; m <= 16; ++m) {
      bool made = false;
      for (int64_t n = 1; n <= 72; ++n) {
        const uint64_t seed = mix(m, n, k), turn = seed >> 20;
        if (turn % every != 0) continue;
        if (!made) make_tokens(m, k, mix(m, 1000, k), -1, tokens);
        made = true;
        make_weight(n, k, choose_tail(seed + 1, k), seed + 2, -1, weight);
        rig.load(tokens, weight, seed % 2 == 0 ? Float::f32 : Float::bf16, make_plan(seed + 3));
        for (Level& level : levels) {
          if (level.usable && turn % (every * level.every) == 0) rig.run(level);
        }
      }
    }
  }
}

// Around the panels and the blocks of rows and depth, on one thread and on two.
void large_shapes(std::vector<Level>& levels, Rig& rig, int64_t every) {
  Tokens tokens;
  Weight weight;
  uint64_t turn = 0;
  for (int64_t k : {255, 256, 257, 511, 512, 513, 1025, 2052, 3000}) {
    for (int64_t m : {47, 48, 49, 191, 192, 193, 400}) {
      for (int64_t n : {63, 64, 65, 127, 128, 129}) {
        const uint64_t seed = mix(m, n, k);
        if (turn++ % every != 0) continue;
        make_tokens(m, k, seed, turn % 2 == 0 ? static_cast<int>(kOutliers) : static_cast<int>(kFills), tokens);
        make_weight(n, k, turn % 3 == 0 ? 0 : choose_tail(seed + 1, k), seed + 2, -1, weight);
        Plan plan = make_plan(seed + 3);
        for (const bool threads : {false, true}) {
          plan.threads = threads;
          if (threads) plan.ranges = 2;
          rig.load(tokens, weight, seed % 2 == 0 ? Float::f32 : Float::bf16, plan);
          for (Level& level : levels) {
            if (level.usable && turn % static_cast<uint64_t>(level.every) == 0) rig.run(level);
          }
        }
      }
    }
  }
}

// Every token fill with every weight fill, tail and list length, and every quantizer.
void fills(std::vector<Level>& levels, Rig& rig, int64_t every) {
  Tokens tokens;
  Weight weight;
  uint64_t turn = 0;
  for (int fill = 0; fill < kFills; ++fill) {
    for (int weight_fill = 0; weight_fill < kWeightFills; ++weight_fill) {
      for (int bits : {2, 4, 6, 8}) {
        for (int outliers : {0, 1, 16, 64}) {
          const uint64_t seed = mix(fill, weight_fill, bits * 100 + outliers);
          if (turn++ % every != 0) continue;
          const int64_t k = 250 + static_cast<int64_t>(turn % 300);
          make_tokens(7, k, seed, fill, tokens);
          tokens.how.bits = bits;
          tokens.how.max_outliers = outliers;
          quantize_tokens(tokens);
          make_weight(65, k, turn % 2 == 0 ? 0 : 37, seed + 1, weight_fill, weight);
          rig.load(tokens, weight, turn % 4 == 0 ? Float::bf16 : Float::f32, make_plan(seed + 2));
          for (Level& level : levels) {
            if (level.usable && turn % static_cast<uint64_t>(level.every) == 0) rig.run(level);
          }
        }
      }
    }
  }
}

// The largest sums that weights of few bits have: every number at its top, every activation at an end of its range.
void few_bits_at_their_ends(std::vector<Level>& levels, Rig& rig) {
  Tokens tokens;
  Weight weight;
  for (const int bits : {2, 4, 6}) {
    const int top = (1 << bits) - 1;
    for (const int zero : {-1, 0, top}) {
      for (const float end : {1.0f, -1.0f}) {
        tokens = Tokens{};
        tokens.m = 7;
        tokens.k = 600;
        tokens.how = {8, 0, 4.0f};
        tokens.x.assign(tokens.m * tokens.k, end);
        quantize_tokens(tokens);
        make_weight(65, tokens.k, 0, 1, kAllTop, weight);
        weight.bits = bits;
        weight.group = 0;
        weight.levels.clear();
        weight.zero.assign(zero < 0 ? 0 : weight.n, static_cast<uint8_t>(zero));
        weight.scale.assign(weight.n, 1.0f / 64.0f);
        std::fill(weight.codes.begin(), weight.codes.end(), static_cast<int8_t>(top - (zero < 0 ? top / 2 + 1 : zero)));
        rig.load(tokens, weight, Float::f32, Plan{});
        for (Level& level : levels) {
          if (level.usable) rig.run(level);
        }
      }
    }
  }
}

// No channel at all, and the most that int32 sums hold: there the unsigned kernels wrap around and back.
void extreme_depths(std::vector<Level>& levels, Rig& rig, int64_t every) {
  Tokens tokens;
  Weight weight;
  uint64_t turn = 0;
  for (int64_t k : {int64_t{0}, int64_t{1000}, ocsquant::kMaxDepth - 8, ocsquant::kMaxDepth}) {
    for (int64_t m : {1, 7}) {
      for (int fill : {kConstant, kHuge, kOutliers}) {
        for (int weight_fill : {kAllTop, kAllBottom, kFull}) {
          if (turn++ % every != 0) continue;
          const uint64_t seed = mix(k, m, fill * 10 + weight_fill);
          make_tokens(m, k, seed, fill, tokens);
          tokens.how = {8, fill == kConstant ? 0 : 16, 2.0f};
          quantize_tokens(tokens);
          make_weight(2, k, k == ocsquant::kMaxDepth - 8 ? 8 : 0, seed + 1, weight_fill, weight);
          rig.load(tokens, weight, Float::f32, Plan{});
          for (Level& level : levels) {
            if (level.usable) rig.run(level);
          }
        }
      }
    }
  }
}

}  // namespace

void test_linear(std::vector<Level>& levels, int64_t every) {
  Rig rig;
  small_shapes(levels, rig, every);
  large_shapes(levels, rig, every > 1 ? 13 : 1);
  fills(levels, rig, every > 1 ? 5 : 1);
  few_bits_at_their_ends(levels, rig);
  extreme_depths(levels, rig, every > 1 ? 5 : 1);
}

}  // namespace coretest
