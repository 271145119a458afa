// What training uses: fake quantization of weights and activations, and kurtosis.
#include <cstring>

#include "tests.h"

namespace coretest {
namespace {

constexpr Side kSides[] = {Side::end, Side::start};

float special(Random& r) {
  const uint32_t kinds[] = {0x7fc00000, 0x7f800000, 0xff800000, 0x80000000, 0x7f7fffff, 0x00000001};
  return float_of(kinds[r.below(6)]);
}

// Values in one row, gradients in another, and what may go wrong with either.
struct Row {
  std::vector<float> x, grad;
  Row(Random& r, int64_t n, float spread, float middle, int specials) : x(n), grad(n) {
    for (int64_t j = 0; j < n; ++j) {
      x[j] = r.gauss() * spread + middle;
      grad[j] = r.gauss();
      if (specials > 0 && r.below(60) == 0) x[j] = special(r);
      if (specials > 1 && r.below(120) == 0) grad[j] = special(r);
    }
  }
};

}  // namespace

void test_fake_quantize_split(Level& level) {
  Arena x_arena, grad_arena, limit_arena, y_arena;
  std::vector<float> x, grad, limit, y, dx;
  for (int64_t k = 0; k <= 300; ++k) {
    for (int turn = 0; turn < 8; ++turn) {
      Random r(mix(k, turn, 1));
      const Side side = kSides[turn % 2];
      // Powers of two give ties; 1/s overflows at none of them.
      const float scales[] = {0.25f, 0.013f, 1.0f, 3e-38f, 1e30f, 0.0625f, 0.7f, 1e-6f};
      const float scale = scales[turn], q = static_cast<float>((1 << (1 + turn)) - 1);
      for (auto* v : {&x, &grad, &limit, &y, &dx}) v->resize(k);
      for (int64_t j = 0; j < k; ++j) {
        limit[j] = q * static_cast<float>(1 + r.below(3));
        x[j] =
            r.next() % 4 == 0 ? scale * (static_cast<float>(r.below(300) - 150) + 0.5f) : scale * r.gauss() * 2.0f * q;
        grad[j] = r.gauss();
        if (turn >= 4 && r.below(50) == 0) x[j] = special(r);
        if (turn >= 6 && r.below(100) == 0) grad[j] = special(r);
        y[j] = fake_quantize(x[j], limit[j], scale);
      }
      const float slope = fake_quantize_gradients(grad.data(), x.data(), limit.data(), scale, k, dx.data());
      // The ops call both in place for bf16.
      for (const bool in_place : {false, true}) {
        Case c(level, "fake_quantize k %ld turn %d%s", long(k), turn, in_place ? " in place" : "");
        float* px = x_arena.copy(x.data(), k, side);
        float* pg = grad_arena.copy(grad.data(), k, side);
        const float* pl = limit_arena.copy(limit.data(), k, side);
        float* py = in_place ? px : y_arena.place<float>(k, side);
        level.kernels->fake_quantize_split.forward(px, pl, scale, k, py);
        for (int64_t j = 0; j < k; ++j) {
          if (!same(py[j], y[j])) c.check(false, "y[%ld] is %a, not %a", long(j), double(py[j]), double(y[j]));
        }
        px = x_arena.copy(x.data(), k, side);
        float* pd = in_place ? pg : y_arena.place<float>(k, side);
        const float got = level.kernels->fake_quantize_split.backward(pg, px, pl, scale, k, pd);
        c.check(same(got, slope), "the gradient of the scale is %a, not %a", double(got), double(slope));
        for (int64_t j = 0; j < k; ++j) {
          if (!same(pd[j], dx[j])) c.check(false, "dx[%ld] is %a, not %a", long(j), double(pd[j]), double(dx[j]));
        }
        for (const Arena* arena : {&x_arena, &grad_arena, &y_arena}) {
          c.check(arena->intact(), "bytes beside an operand were written");
        }
      }
    }
  }
}

void test_fake_quantize_clip(Level& level) {
  Arena x_arena, grad_arena, y_arena;
  const float clips[][2] = {{-2.5f, 2.5f}, {-0.5f, 3.0f}, {1.0f, 1.0f}, {2.0f, -1.0f}, {-3e-5f, 2e-5f}, {0.0f, 0.0f}};
  for (int64_t n = 0; n <= 300; ++n) {
    for (int turn = 0; turn < 12; ++turn) {
      Random r(mix(n, turn, 5));
      const Side side = kSides[turn % 2];
      const float* clip = clips[turn % 6];
      const ocsquant::ClipGrid grid = ocsquant::clip_grid(clip[0], clip[1], 2 + static_cast<int>(r.below(7)), turn > 5);
      Row row(r, n, turn % 3 == 0 ? 1.0f : 2.0f * (grid.high - grid.low), grid.low, turn / 4);
      for (int64_t j = 0; j < n; ++j) {  // the clips themselves, and ties between two levels
        if (r.below(8) == 0) row.x[j] = r.below(2) == 0 ? grid.low : grid.high;
        if (r.below(8) == 0) row.x[j] = grid.low + (static_cast<float>(r.below(16)) + 0.5f) * grid.step;
      }
      std::vector<float> dx(n);
      const ocsquant::ClipSums sums = fake_quantize_clip_gradients(row.grad.data(), row.x.data(), grid, n, dx.data());
      for (const bool in_place : {false, true}) {
        Case c(level, "fake_quantize_clip n %ld turn %d%s", long(n), turn, in_place ? " in place" : "");
        float* px = x_arena.copy(row.x.data(), n, side);
        float* py = in_place ? px : y_arena.place<float>(n, side);
        level.kernels->fake_quantize_clip.forward(px, grid, n, py);
        for (int64_t j = 0; j < n; ++j) {
          const float want = fake_quantize_clip(row.x[j], grid);
          if (!same(py[j], want)) c.check(false, "y[%ld] is %a, not %a", long(j), double(py[j]), double(want));
        }
        px = x_arena.copy(row.x.data(), n, side);
        float* pg = grad_arena.copy(row.grad.data(), n, side);
        float* pd = in_place ? pg : y_arena.place<float>(n, side);
        const ocsquant::ClipSums got = level.kernels->fake_quantize_clip.backward(pg, px, grid, n, pd);
        c.check(same(got.below, sums.below) && same(got.above, sums.above) && same(got.inside, sums.inside),
                "the sums are %a %a %a, not %a %a %a", double(got.below), double(got.above), double(got.inside),
                double(sums.below), double(sums.above), double(sums.inside));
        for (int64_t j = 0; j < n; ++j) {
          if (!same(pd[j], dx[j])) c.check(false, "dx[%ld] is %a, not %a", long(j), double(pd[j]), double(dx[j]));
        }
        for (const Arena* arena : {&x_arena, &grad_arena, &y_arena}) {
          c.check(arena->intact(), "bytes beside an operand were written");
        }
      }
    }
  }
}

void test_kurtosis(Level& level) {
  Arena y_arena, grad_arena, out_arena;
  for (int64_t d = 1; d <= 300; ++d) {
    for (int turn = 0; turn < 10; ++turn) {
      Random r(mix(d, turn, 6));
      const Side side = kSides[turn % 2];
      const float spreads[] = {1.0f, 1e-3f, 1e6f, 0.0f, 1.0f, 1e-30f, 1e18f, 1.0f, 3.0f, 1e-6f};
      Row row(r, d, spreads[turn], turn % 4 == 3 ? 100.0f : 0.0f, turn == 7 ? 1 : 0);
      const float target = turn % 2 == 0 ? 0.0f : 2.8f, factor = turn == 8 ? 0.0f : 0.01f;
      std::vector<float> want(d);
      // With a gradient beside, with one in the output itself, without one.
      for (int place = 0; place < 3; ++place) {
        Case c(level, "kurtosis d %ld turn %d place %d", long(d), turn, place);
        const float* given = place == 2 ? nullptr : row.grad.data();
        const float k = kurtosis_gradient(given, row.x.data(), d, factor, target, want.data());
        const float* py = y_arena.copy(row.x.data(), d, side);
        float* pg = grad_arena.copy(row.grad.data(), d, side);
        float* out = place == 1 ? pg : out_arena.place<float>(d, side);
        c.check(same(level.kernels->kurtosis.forward(py, d), k), "K is not %a", double(k));
        const float got = level.kernels->kurtosis.add_gradient(place == 2 ? nullptr : pg, py, d, factor, target, out);
        c.check(same(got, k), "K is %a, not %a", double(got), double(k));
        for (int64_t j = 0; j < d; ++j) {
          if (!same(out[j], want[j]))
            c.check(false, "out[%ld] is %a, not %a", long(j), double(out[j]), double(want[j]));
        }
        for (const Arena* arena : {&y_arena, &grad_arena, &out_arena}) {
          c.check(arena->intact(), "bytes beside an operand were written");
        }
      }
    }
  }
}

}  // namespace coretest
