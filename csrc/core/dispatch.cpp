// Which table runs: by what CPUID and the operating system's saved register state say, never by the vendor's name.
#include <cstring>

#include "kernels.h"
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace ocsquant {
namespace {

struct Level {
  const Kernels* kernels;
  bool usable;
};

#if defined(__x86_64__)
// The operating system saves tiles only for processes that have asked for it.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// __builtin_cpu_supports of older compilers does not know AVX-VNNI, hence by hand.
struct X86 {
  bool avx2 = false, avx_vnni = false, avx512_vnni = false, amx_int8 = false;
  X86() {
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !((c >> 27) & 1)) return;  // OSXSAVE
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const bool ymm = (low & 0x6) == 0x6, zmm = (low & 0xe6) == 0xe6, tiles = (low & 0x60000) == 0x60000;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = ymm && ((b >> 5) & 1);
    const bool foundation = ((b >> 16) & 1) && ((b >> 17) & 1) && ((b >> 30) & 1) && ((b >> 31) & 1);  // F, DQ, BW, VL
    avx512_vnni = avx2 && zmm && foundation && ((c >> 11) & 1);
    amx_int8 = avx512_vnni && tiles && ((d >> 24) & 1) && ((d >> 25) & 1) && may_use_tiles();
    uint32_t a1, b1, c1, d1;
    avx_vnni = avx2 && a >= 1 && __get_cpuid_count(7, 1, &a1, &b1, &c1, &d1) && ((a1 >> 4) & 1);
  }
};
#endif

}  // namespace

const Kernels* select_kernels(const char* wanted, const char** why) {
#if defined(__x86_64__)
  const X86 cpu;
  const Level levels[] = {{&kAmxInt8, cpu.amx_int8},
                          {&kAvx512Vnni, cpu.avx512_vnni},
                          {&kAvxVnni, cpu.avx_vnni},
                          {&kAvx2, cpu.avx2},
                          {&kScalar, true}};
#else
  const Level levels[] = {{&kScalar, true}};
#endif
  const bool free = wanted == nullptr || *wanted == '\0';
  for (const Level& level : levels) {
    if (!free && std::strcmp(level.kernels->isa, wanted) != 0) continue;
    if (level.usable) {
      *why = free ? "the highest level this CPU and its operating system support" : "named by OCSQUANT_ISA";
      return level.kernels;
    }
    if (!free) {
      *why = "this CPU or its operating system does not support it";
      return nullptr;
    }
  }
  *why = "no such level";
  return nullptr;
}

}  // namespace ocsquant
