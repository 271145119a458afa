// Memory that ends right before, or starts right behind, an inaccessible page: a kernel that reads or writes one byte
// too many dies. ASan alone does not see what assembly and masked vector accesses touch. On the open side lie known
// bytes (under ASan: poisoned ones), so a write there is noticed too.
#pragma once
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace coretest {

enum class Side { end, start };

class Arena {
 public:
  explicit Arena(size_t capacity = size_t{16} << 20) : bytes_((capacity + kPage - 1) / kPage * kPage) {
    void* all = mmap(nullptr, bytes_ + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<uint8_t*>(all) + kPage;
    if (mprotect(base_, bytes_, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
  }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() {
    open_margin();
    munmap(base_ - kPage, bytes_ + 2 * kPage);
  }

  // `count` values against the inaccessible page on that side, holding arbitrary bytes: no kernel may rely on them.
  template <class T>
  T* place(int64_t count, Side side) {
    const size_t size = static_cast<size_t>(count) * sizeof(T);
    if (size + kMargin > bytes_) {
      std::printf("a test operand of %zu bytes does not fit its arena\n", size);
      std::abort();
    }
    open_margin();
    uint8_t* p = side == Side::end ? base_ + bytes_ - size : base_;
    margin_ = side == Side::end ? p - kMargin : p + size;
    std::memset(p, kFill, size);
    std::memset(margin_, kFill, kMargin);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(margin_, kMargin);
#endif
    return reinterpret_cast<T*>(p);
  }
  template <class T>
  T* copy(const T* values, int64_t count, Side side) {
    T* p = place<T>(count, side);
    if (count > 0) std::memcpy(p, values, static_cast<size_t>(count) * sizeof(T));
    return p;
  }
  bool intact() const {
#if !defined(__SANITIZE_ADDRESS__)
    for (size_t i = 0; i < kMargin; ++i) {
      if (margin_[i] != kFill) return false;
    }
#endif
    return true;
  }

 private:
  static constexpr size_t kPage = 4096, kMargin = 128;
  static constexpr uint8_t kFill = 0xa5;

  void open_margin() {
#if defined(__SANITIZE_ADDRESS__)
    if (margin_ != nullptr) ASAN_UNPOISON_MEMORY_REGION(margin_, kMargin);
#endif
  }

  size_t bytes_;
  uint8_t* base_ = nullptr;
  uint8_t* margin_ = nullptr;
};

}  // namespace coretest
