// What a test writes down: one Level per kernel table, and the case at hand for whoever dies in it.
#pragma once
#include <chrono>
#include <cstdarg>
#include <cstdint>
#include <cstdio>

#include "core/kernels.h"

namespace coretest {

struct Level {
  const char* name;
  const ocsquant::Kernels* kernels;
  bool usable;
  int64_t every;  // of the small shapes this level runs one in so many (an emulated level is slow)
  int64_t passed = 0, failed = 0;
  double seconds = 0.0;
};

extern char g_case[512];  // printed when a guard page is hit

// One case of one level; the text says which, and is printed for the first failures.
class Case {
 public:
  __attribute__((format(printf, 3, 4))) Case(Level& level, const char* format, ...)
      : level_(level), start_(std::chrono::steady_clock::now()) {
    const int at = std::snprintf(g_case, sizeof(g_case), "%s: ", level.name);
    va_list args;
    va_start(args, format);
    std::vsnprintf(g_case + at, sizeof(g_case) - at, format, args);
    va_end(args);
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;
  ~Case() {
    level_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
    ++(failed_ ? level_.failed : level_.passed);
  }
  __attribute__((format(printf, 3, 4))) bool check(bool good, const char* format, ...) {
    if (good) return true;
    if (!failed_ && level_.failed < 5) {
      std::printf("FAILED %s: ", g_case);
      va_list args;
      va_start(args, format);
      std::vprintf(format, args);
      va_end(args);
      std::printf("\n");
    }
    failed_ = true;
    return false;
  }

 private:
  Level& level_;
  std::chrono::steady_clock::time_point start_;
  bool failed_ = false;
};

}  // namespace coretest
