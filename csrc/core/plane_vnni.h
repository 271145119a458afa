// Samples of int8 codes, for the rows of tile_vnni.h: bodies and rests are told apart once, and a patch copies them.
// Included inside a target region, after tile_vnni.h.
#pragma once

namespace ocsquant {
namespace {

class BytesPlane {
 public:
  // Bodies [pixels][channels], then the number of rests; if there are any, for each pixel and for the end the number of
  // those before it, then they themselves, at the element of the sample they belong to.
  static int64_t bytes(const PatchShape& s, int max_outliers) {
    return rests_at(s) + (most_rests(s, max_outliers) * static_cast<int64_t>(sizeof(Rest)) + 63) / 64 * 64;
  }
  // What takes the codes of a sample: bodies and rests as they come.
  class Out {
   public:
    Out(const PatchShape& s, uint8_t* plane, int max_outliers)
        : bytes_(plane),
          rests_(reinterpret_cast<Rest*>(plane + rests_at(s))),
          room_(static_cast<int32_t>(most_rests(s, max_outliers))),
          shape_(&s) {}
    OCSQ_INLINE void start(int64_t element) { first_ = element; }
    template <bool kOutliers>
    OCSQ_INLINE void put(int64_t j, Simd::Codes some, uint32_t beyond) {
      Narrow::store(some, bytes_ + first_ + j);
      if (!kOutliers || (beyond &= kOnce) == 0) return;
      int16_t codes[sizeof(some) / sizeof(int16_t)];
      Simd::store_codes(codes, some);
      for (; beyond != 0; beyond &= beyond - 1) {
        const int at = __builtin_ctz(beyond) / Simd::kCodeBits;
        const int32_t rest = rest_of(codes[at]);
        // Where there are more, the sample will be quantized again, with a step that leaves none.
        if (rest != 0 && count_ < room_) rests_[count_++] = {static_cast<int32_t>(first_ + j + at), rest};
      }
    }
    void zeros(int64_t values) { std::memset(bytes_, 0, values); }
    void finish() {
      int32_t* before = reinterpret_cast<int32_t*>(bytes_ + rest_count_at(*shape_));
      *before++ = count_;
      int32_t passed = 0;
      for (int64_t p = 0; p <= shape_->pixels() && count_ > 0; ++p) {
        while (passed < count_ && rests_[passed].k < p * shape_->channels) ++passed;
        before[p] = passed;
      }
    }

   private:
    uint8_t* bytes_;
    Rest* rests_;
    int64_t first_ = 0;
    int32_t count_ = 0, room_;
    const PatchShape* shape_;
  };

  static int64_t largest_outliers(const uint8_t* plane, const PatchShape& s) {
    const int32_t* before = rests_before(plane, s);
    int32_t most = 0;
    for (int64_t p = 0; p < s.pixels() && before != nullptr; ++p) {
      most = before[p + 1] - before[p] > most ? before[p + 1] - before[p] : most;
    }
    return most;
  }

  template <class Tile>
  static void place(const Planes& planes, const PatchShape& shape, int64_t row, const PackedWeight& w,
                    const Activations& a, int64_t rows, void*) {
    Patch patch(planes, shape, w, a);
    for_patches(shape, row, rows, patch);
    patch.sums(rows);
  }

 private:
  static int64_t most_rests(const PatchShape& s, int max_outliers) {
    const int64_t of_pixels = s.pixels() * max_outliers;
    return of_pixels < s.values() ? of_pixels : s.values();
  }
  // Bodies are written in whole blocks of 64 from any pixel on.
  static int64_t rest_count_at(const PatchShape& s) { return (s.values() + 63) / 64 * 64 + 64; }
  static int64_t rests_at(const PatchShape& s) {
    return rest_count_at(s) + ((s.pixels() + 2) * static_cast<int64_t>(sizeof(int32_t)) + 63) / 64 * 64;
  }
  // [pixels + 1], or null where there are none.
  static const int32_t* rests_before(const uint8_t* plane, const PatchShape& s) {
    const int32_t* count = reinterpret_cast<const int32_t*>(plane + rest_count_at(s));
    return *count > 0 ? count + 1 : nullptr;
  }

  class Patch {
   public:
    Patch(const Planes& planes, const PatchShape& shape, const PackedWeight& w, const Activations& a)
        : planes_(planes), shape_(shape), w_(w), a_(a) {}

    OCSQ_INLINE void row(int64_t sample, int64_t m) {
      a_.step[m] = planes_.step[sample];
      const uint8_t* plane = planes_.first + sample * planes_.bytes;
      bodies_ = plane;
      before_ = rests_before(plane, shape_);
      from_ = reinterpret_cast<const Rest*>(plane + rests_at(shape_));
      to_ = a_.codes + m * a_.row_bytes;
      rests_ = a_.rests + m * a_.rest_capacity;
      m_ = m;
      count_ = 0;
    }
    OCSQ_INLINE void lines(int64_t at, int64_t pixel, int64_t pitch, int64_t count, int64_t width) {
      const int64_t channels = shape_.channels, bytes = width * channels;
      const uint8_t* from = bodies_ + pixel * channels;
      uint8_t* to = to_ + at;
      // What a short line has too much the next one, or what is behind the patch, writes over; there is room for it.
      const bool fits = at + count * bytes + kShort <= a_.row_bytes;
      if (bytes <= kShort && fits) {
        for (int64_t i = 0; i < count; ++i, from += pitch * channels, to += bytes) std::memcpy(to, from, kShort);
      } else {
        for (int64_t i = 0; i < count; ++i, from += pitch * channels, to += bytes) std::memcpy(to, from, bytes);
      }
      for (int64_t i = 0; i < count && before_ != nullptr; ++i, at += bytes, pixel += pitch) {
        for (int32_t r = before_[pixel]; r < before_[pixel + width]; ++r) {
          rests_[count_++] = {static_cast<int32_t>(from_[r].k - pixel * channels + at), from_[r].value};
        }
      }
    }
    OCSQ_INLINE void zeros(int64_t at, int64_t count) const { std::memset(to_ + at, 0, count * shape_.channels); }
    OCSQ_INLINE void done() {
      const int64_t base = w_.base_groups() * kGroup, end = base + w_.tail, whole = (w_.depth() + 63) / 64 * 64;
      for (int64_t k = w_.k; k < base; ++k) to_[k] = 0;
      if (w_.tail > 0) add_tail(base);
      std::memset(to_ + end, 0, whole - end);
      a_.rest_count[m_] = count_;
    }
    // Of all rows, once they are there: vectors would wait for the lines that have just been written.
    void sums(int64_t rows) const {
      const int64_t whole = (w_.depth() + 63) / 64 * 64;
      for (int64_t m = 0; m < rows; ++m) {
        const uint8_t* bodies = a_.codes + m * a_.row_bytes;
        const Rest* rests = a_.rests + m * a_.rest_capacity;
        int32_t sum = Narrow::sum_bytes(bodies, whole);
        for (int32_t r = 0; r < a_.rest_count[m]; ++r) sum += rests[r].value;
        a_.offset_codes[m] = sum;
        if (a_.group_offset_codes == nullptr) continue;
        sum_groups(reinterpret_cast<const int8_t*>(bodies), rests, a_.rest_count[m],
                   a_.group_offset_codes + m * w_.scale_groups());
      }
    }

   private:
    static constexpr int64_t kShort = 32;

    void sum_groups(const int8_t* bodies, const Rest* rests, int32_t count, int32_t* sums) const {
      const int64_t size = w_.group_channels;
      for (int64_t g = 0; g < w_.scale_groups(); ++g) {
        const int64_t first = g * size, last = first + size < w_.k ? first + size : w_.k;
        int32_t sum = 0;
        for (int64_t k = first; k < last; ++k) sum += bodies[k];
        sums[g] = sum;
      }
      for (int32_t r = 0; r < count; ++r) sums[rests[r].k / size] += rests[r].value;
    }
    // The columns of split channels: codes, and with them rests, a second time.
    void add_tail(int64_t base) {
      const int32_t rests = count_;
      for (int32_t e = 0, r = 0; e < w_.tail; ++e) {
        const int32_t k = w_.tail_index[e];
        to_[base + e] = to_[k];
        while (r < rests && rests_[r].k < k) ++r;
        if (r == rests || rests_[r].k != k) continue;
        rests_[count_++] = {static_cast<int32_t>(base + e), rests_[r].value};
      }
    }

    const Planes& planes_;
    const PatchShape& shape_;
    const PackedWeight& w_;
    const Activations& a_;
    const uint8_t* bodies_ = nullptr;
    const int32_t* before_ = nullptr;
    const Rest* from_ = nullptr;
    uint8_t* to_ = nullptr;
    Rest* rests_ = nullptr;
    int64_t m_ = 0;
    int32_t count_ = 0;
  };
};

}  // namespace
}  // namespace ocsquant
