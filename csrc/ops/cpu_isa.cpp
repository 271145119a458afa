#include <cstdlib>
#include <string>
#include <tuple>

#include "check.h"

namespace ocsquant {
namespace {

struct Selection {
  const char* why = nullptr;
  const Kernels* kernels = select_kernels(std::getenv("OCSQUANT_ISA"), &why);
};

const Selection& selection() {
  static const Selection chosen;
  return chosen;
}

std::tuple<std::string, std::string> cpu_isa() {
  const Kernels& kernels = cpu_kernels();
  return {kernels.isa, selection().why};
}

}  // namespace

const Kernels& cpu_kernels() {
  const Selection& chosen = selection();
  OCSQ_CHECK(chosen.kernels != nullptr, "OCSQUANT_ISA=", std::getenv("OCSQUANT_ISA"), ": ", chosen.why,
             "; expected amx_int8, avx512_vnni, avx_vnni, avx2 or scalar");
  return *chosen.kernels;
}

STABLE_TORCH_LIBRARY_IMPL(ocsquant, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace ocsquant
