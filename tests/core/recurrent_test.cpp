// The cells of LSTM and GRU: the same bits on every level, near the definition in double.
#include <cmath>

#include "tests.h"

namespace coretest {
namespace {

double sigmoid(double x) { return 1.0 / (1.0 + std::exp(-x)); }

std::vector<float> values(Random& r, int64_t n, float spread, bool wild) {
  std::vector<float> v(n);
  for (float& x : v) {
    x = r.gauss() * spread;
    if (wild && r.below(20) == 0) {
      const float kinds[] = {
          0.0f, -0.0f, 90.0f, -90.0f, 1e30f, -1e30f, 0.3f, float_of(0x7f800000), float_of(0x7fc00000)};
      x = kinds[r.below(9)];
    }
  }
  return v;
}

// Both cells of every level see the same rows; the first level that runs says what the others must give.
struct Cells {
  std::vector<float> x, r, c, h, lstm_c, lstm_y, gru_h;
  int64_t hidden;

  void expect() {
    lstm_c.resize(hidden);
    lstm_y.resize(hidden);
    gru_h.resize(hidden);
    const auto gate = [&](int g, int64_t j) { return x[g * hidden + j] + r[g * hidden + j]; };
    for (int64_t j = 0; j < hidden; ++j) {
      const double i = sigmoid(gate(0, j)), f = sigmoid(gate(1, j)), o = sigmoid(gate(3, j));
      const double cell = f * c[j] + i * std::tanh(static_cast<double>(gate(2, j)));
      lstm_c[j] = static_cast<float>(cell);
      lstm_y[j] = static_cast<float>(o * std::tanh(cell));
      const double reset = sigmoid(gate(0, j)), update = sigmoid(gate(1, j));
      const double fresh = std::tanh(x[2 * hidden + j] + reset * r[2 * hidden + j]);
      gru_h[j] = static_cast<float>(fresh + update * (h[j] - fresh));
    }
  }
};

bool near(float got, float want) {
  if (std::isnan(want) || std::isnan(got)) return std::isnan(want) == std::isnan(got);
  return std::isinf(want) ? got == want : std::fabs(got - want) <= 1e-6f + 1e-6f * std::fabs(want);
}

}  // namespace

void test_recurrent(std::vector<Level>& levels) {
  Arena x_arena, r_arena, c_arena, y_arena;
  for (int64_t hidden = 1; hidden <= 70; ++hidden) {
    for (int turn = 0; turn < 12; ++turn) {
      Random r(mix(hidden, turn, 9));
      const Side side = turn % 2 == 0 ? Side::end : Side::start;
      const float spread = turn % 3 == 0 ? 0.1f : turn % 3 == 1 ? 1.0f : 8.0f;
      const bool wild = turn >= 8;
      Cells cells{values(r, 4 * hidden, spread, wild),
                  values(r, 4 * hidden, spread, wild),
                  values(r, hidden, 1.0f, wild),
                  values(r, hidden, 0.5f, false),
                  {},
                  {},
                  {},
                  hidden};
      cells.expect();
      std::vector<float> first_y, first_c, first_h;
      for (Level& level : levels) {
        if (!level.usable) continue;
        Case c(level, "recurrent cells, %ld hidden units, turn %d", long(hidden), turn);
        const float* x = x_arena.copy(cells.x.data(), 4 * hidden, side);
        const float* recurrent = r_arena.copy(cells.r.data(), 4 * hidden, side);
        float* state = c_arena.copy(cells.c.data(), hidden, side);
        float* y = y_arena.place<float>(hidden, side);
        level.kernels->recurrent.lstm_cell(x, recurrent, hidden, state, y);
        for (int64_t j = 0; j < hidden; ++j) {
          if (!near(state[j], cells.lstm_c[j]))
            c.check(false, "c[%ld] is %a, not %a", long(j), state[j], cells.lstm_c[j]);
          if (!near(y[j], cells.lstm_y[j])) c.check(false, "y[%ld] is %a, not %a", long(j), y[j], cells.lstm_y[j]);
          if (first_y.empty()) continue;
          c.check(same(y[j], first_y[j]) && same(state[j], first_c[j]), "unit %ld has other bits", long(j));
        }
        if (first_c.empty()) first_c.assign(state, state + hidden);
        const bool begins = first_y.empty();
        if (begins) first_y.assign(y, y + hidden);
        c.check(c_arena.intact() && y_arena.intact(), "bytes beside an operand were written");
        x = x_arena.copy(cells.x.data(), 3 * hidden, side);
        recurrent = r_arena.copy(cells.r.data(), 3 * hidden, side);
        float* last = c_arena.copy(cells.h.data(), hidden, side);
        level.kernels->recurrent.gru_cell(x, recurrent, hidden, last);
        for (int64_t j = 0; j < hidden; ++j) {
          if (!near(last[j], cells.gru_h[j])) c.check(false, "h[%ld] is %a, not %a", long(j), last[j], cells.gru_h[j]);
          c.check(begins || same(last[j], first_h[j]), "unit %ld of the GRU has other bits", long(j));
        }
        if (begins) first_h.assign(last, last + hidden);
        c.check(c_arena.intact(), "bytes beside an operand were written");
      }
    }
  }
}

}  // namespace coretest
