// Tests of csrc/core without torch: every instruction-set level this CPU runs, and the AVX-512 ones emulated by SIMDe
// where that is installed, against the definition (oracle.h), bit for bit, with every operand against a guard page.
//
//   core_test [--every N]   run one in N of the 156672 small shapes, and a part of the rest (default 1: everything)
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "tests.h"
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#endif
#endif

namespace ocsquant {
extern const Kernels kAvx512VlVnni;  // avx_vnni.cpp compiled again with the EVEX encoding
extern const Kernels kAvx512VnniEmulated, kAvx512VlVnniEmulated, kAmxInt8Emulated;
}  // namespace ocsquant

namespace coretest {

char g_case[512] = "nothing yet";

namespace {

struct Cpu {
  bool avx2 = false, avx_vnni = false, avx512_vnni = false, avx512vl_vnni = false, amx_int8 = false;
};

#if defined(__x86_64__)
Cpu read_cpu() {
  Cpu cpu;
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & bit_OSXSAVE) == 0) return cpu;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  const uint32_t leaves = a, tiles = 3u << 24, state = 3u << 17;
  const bool zmm = (low & 0xe6) == 0xe6, vnni = (c & (1u << 11)) != 0;
  cpu.avx2 = (low & 6) == 6 && (b & bit_AVX2) != 0;
  cpu.avx512vl_vnni =
      cpu.avx2 && zmm && vnni && (b & bit_AVX512F) != 0 && (b & bit_AVX512BW) != 0 && (b & bit_AVX512VL) != 0;
  cpu.avx512_vnni = cpu.avx512vl_vnni && (b & bit_AVX512DQ) != 0;
#if defined(__linux__)
  cpu.amx_int8 = cpu.avx512_vnni && (d & tiles) == tiles && (low & state) == state &&
                 syscall(SYS_arch_prctl, 0x1023, 18) == 0;  // asks for the permission
#endif
  cpu.avx_vnni = cpu.avx2 && leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4)) != 0;
  return cpu;
}
#endif

// The first in the order of select_kernels(), best first, then those it does not know.
std::vector<Level> all_levels(size_t& selectable) {
  std::vector<Level> levels;
#if defined(__x86_64__)
  const Cpu cpu = read_cpu();
  levels.push_back({"amx_int8", &ocsquant::kAmxInt8, cpu.amx_int8, 1});
  levels.push_back({"avx512_vnni", &ocsquant::kAvx512Vnni, cpu.avx512_vnni, 1});
  levels.push_back({"avx_vnni", &ocsquant::kAvxVnni, cpu.avx_vnni, 1});
  levels.push_back({"avx2", &ocsquant::kAvx2, cpu.avx2, 1});
#endif
  levels.push_back({"scalar", &ocsquant::kScalar, true, 1});
  selectable = levels.size();
#if defined(__x86_64__)
  levels.push_back({"avx512vl_vnni", &ocsquant::kAvx512VlVnni, cpu.avx512vl_vnni, 1});
#if defined(OCSQ_TEST_EMULATED)
  levels.push_back({"avx512_vnni (emulated)", &ocsquant::kAvx512VnniEmulated, cpu.avx2, 4});
  levels.push_back({"amx_int8 (emulated)", &ocsquant::kAmxInt8Emulated, cpu.avx2, 4});
  levels.push_back({"avx512vl_vnni (emulated)", &ocsquant::kAvx512VlVnniEmulated, cpu.avx2, 4});
#endif
#endif
  return levels;
}

#if !defined(__SANITIZE_ADDRESS__)
// Says in which case an operand's end was overrun; only what a signal handler may call.
void on_fault(int) {
  const char text[] = "FAILED by a memory fault: ";
  if (write(1, text, sizeof(text) - 1) < 0 || write(1, g_case, std::strlen(g_case)) < 0 || write(1, "\n", 1) < 0)
    _exit(3);
  _exit(1);
}
#endif

int run(int64_t every) {
  size_t selectable = 0;
  std::vector<Level> levels = all_levels(selectable);
  Level general = {"packing and selection", nullptr, true, 1};
  test_packing(general);
  test_selection(general, std::vector<Level>(levels.begin(), levels.begin() + static_cast<int64_t>(selectable)));
  for (Level& level : levels) {
    if (!level.usable) continue;
    test_fake_quantize_split(level);
    test_fake_quantize_clip(level);
    test_kurtosis(level);
    test_dequantize(level);
    test_conversions(level);
  }
  test_convolution(levels, every);
  test_recurrent(levels);
  test_nonlinearity(levels);
  test_linear(levels, every);

  levels.push_back(general);
  int64_t passed = 0, failed = 0, skipped = 0;
  for (const Level& level : levels) {
    if (level.usable) {
      std::printf("%s: %ld passed, %ld failed, %.1f s\n", level.name, long(level.passed), long(level.failed),
                  level.seconds);
    } else {
      std::printf("skipped: %s: this CPU lacks it\n", level.name);
      ++skipped;
    }
    passed += level.passed;
    failed += level.failed;
  }
#if !defined(OCSQ_TEST_EMULATED)
  std::printf("skipped: emulated levels: built without SIMDe (Debian package libsimde-dev)\n");
  skipped += 2;
#endif
  std::printf("%ld passed, %ld failed, %ld skipped\n", long(passed), long(failed), long(skipped));
  return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace coretest

int main(int count, char** arguments) {
  const bool chosen = count == 3 && std::strcmp(arguments[1], "--every") == 0;
  const int64_t every = chosen ? std::atoll(arguments[2]) : 1;
  if ((count > 1 && !chosen) || every < 1) {
    std::printf("usage: core_test [--every N]\n");
    return 2;
  }
#if !defined(__SANITIZE_ADDRESS__)
  signal(SIGSEGV, coretest::on_fault);
  signal(SIGBUS, coretest::on_fault);
#endif
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  return coretest::run(every);
}
