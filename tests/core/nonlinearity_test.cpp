// The nonlinearities behind a layer: the same bits on every level, near the definition in double.
#include <cmath>

#include "tests.h"

namespace coretest {
namespace {

using ocsquant::Nonlinearity;

double exact(Nonlinearity which, double x) {
  switch (which) {
    case Nonlinearity::none:
      return x;
    case Nonlinearity::relu:
      return x > 0.0 || std::isnan(x) ? x : 0.0;
    case Nonlinearity::gelu:
      return 0.5 * x * std::erfc(-x / std::sqrt(2.0));
    case Nonlinearity::gelu_tanh:
      return 0.5 * x * (1.0 + std::tanh(std::sqrt(2.0 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Nonlinearity::silu:
      return x / (1.0 + std::exp(-x));
    case Nonlinearity::sigmoid:
      return 1.0 / (1.0 + std::exp(-x));
    case Nonlinearity::tanh:
      return std::tanh(x);
  }
  return 0.0;
}

// Within three roundings of the argument or the result: what 1 + erf(x) loses below 0 PyTorch loses too.
bool near(float got, double x, double want) {
  if (std::isnan(want)) return std::isnan(got);
  return std::fabs(got - want) <= 4e-7 * std::max(std::fabs(want), std::min(std::fabs(x), 20.0)) + 1e-7;
}

std::vector<float> arguments() {
  std::vector<float> x = {0.0f, -0.0f, 5.6f, -5.6f, 87.0f, -87.0f, 1e4f, -1e4f, 1e30f, -1e30f, float_of(0x7fc00000)};
  for (int i = -12000; i <= 12000; ++i) x.push_back(static_cast<float>(i) / 1000.0f);
  Random r(5);
  for (int i = 0; i < 20000; ++i) x.push_back(r.gauss() * std::ldexp(1.0f, static_cast<int>(r.below(24)) - 18));
  return x;
}

}  // namespace

void test_nonlinearity(std::vector<Level>& levels) {
  const std::vector<float> x = arguments();
  Arena arena;
  for (int which = 0; which < kNonlinearities; ++which) {
    const Nonlinearity function = static_cast<Nonlinearity>(which);
    std::vector<float> first;
    for (Level& level : levels) {
      if (!level.usable) continue;
      Case c(level, "nonlinearity %d", which);
      float* y = arena.place<float>((x.size() + 15) / 16 * 16, Side::end);
      std::copy(x.begin(), x.end(), y);
      level.kernels->nonlinear(function, static_cast<int64_t>(x.size()), y);
      for (size_t i = 0; i < x.size(); ++i) {
        if (near(y[i], x[i], exact(function, x[i])) && (first.empty() || same(y[i], first[i]))) continue;
        c.check(false, "of %a is %a, not %a", double(x[i]), double(y[i]), exact(function, x[i]));
        break;
      }
      if (first.empty()) first.assign(y, y + x.size());
      c.check(arena.intact(), "bytes beside the values were written");
    }
  }
}

}  // namespace coretest
