// Samples of int8 codes, for the rows of tile_vnni.h: bodies and rests are told apart once, and a patch copies them.
// Included inside a target region, after tile_vnni.h.
#pragma once

namespace ocsquant {
namespace {

class BytesPlane {
 public:
  // Bodies [pixels][channels], then for each pixel, and for the end, the sum of all codes and the number of rests
  // before it, then the rests, at the element of the sample they belong to.
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
      int32_t *sums = reinterpret_cast<int32_t*>(bytes_ + sums_at(*shape_)), *before = sums + shape_->pixels() + 1;
      const int8_t* bodies = reinterpret_cast<const int8_t*>(bytes_);
      uint32_t sum = 0;  // over a whole sample it may wrap around: only differences are used
      int32_t passed = 0;
      for (int64_t p = 0;; ++p, bodies += shape_->channels) {
        for (; passed < count_ && rests_[passed].k < p * shape_->channels; ++passed) {
          sum += static_cast<uint32_t>(rests_[passed].value);
        }
        sums[p] = static_cast<int32_t>(sum);
        before[p] = passed;
        if (p == shape_->pixels()) return;
        int32_t of_pixel = 0;
        for (int64_t c = 0; c < shape_->channels; ++c) of_pixel += bodies[c];
        sum += static_cast<uint32_t>(of_pixel);
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
    const int32_t* before = reinterpret_cast<const int32_t*>(plane + sums_at(s)) + s.pixels() + 1;
    int32_t most = 0;
    for (int64_t p = 0; p < s.pixels(); ++p) most = before[p + 1] - before[p] > most ? before[p + 1] - before[p] : most;
    return most;
  }

  template <class Tile>
  static void place(const Planes& planes, const PatchShape& shape, int64_t row, const PackedWeight& w,
                    const Activations& a, int64_t rows, void*) {
    Patch patch(planes, shape, w, a);
    for_patches(shape, row, rows, patch);
  }

 private:
  static int64_t most_rests(const PatchShape& s, int max_outliers) {
    const int64_t of_pixels = s.pixels() * max_outliers;
    return of_pixels < s.values() ? of_pixels : s.values();
  }
  // Bodies are written in whole blocks of 64 from any pixel on.
  static int64_t sums_at(const PatchShape& s) { return (s.values() + 63) / 64 * 64 + 64; }
  static int64_t rests_at(const PatchShape& s) {
    return sums_at(s) + (2 * (s.pixels() + 1) * static_cast<int64_t>(sizeof(int32_t)) + 63) / 64 * 64;
  }

  class Patch {
   public:
    Patch(const Planes& planes, const PatchShape& shape, const PackedWeight& w, const Activations& a)
        : planes_(planes), shape_(shape), w_(w), a_(a) {}

    OCSQ_INLINE void row(int64_t sample, int64_t m) {
      a_.step[m] = planes_.step[sample];
      const uint8_t* plane = planes_.first + sample * planes_.bytes;
      bodies_ = plane;
      sums_ = reinterpret_cast<const int32_t*>(plane + sums_at(shape_));
      from_ = reinterpret_cast<const Rest*>(plane + rests_at(shape_));
      to_ = a_.codes + m * a_.row_bytes;
      rests_ = a_.rests + m * a_.rest_capacity;
      m_ = m;
      count_ = 0;
      sum_ = 0;
    }
    OCSQ_INLINE void copy(int64_t at, int64_t pixel, int64_t count) {
      const int64_t first = pixel * shape_.channels;
      std::memcpy(to_ + at, bodies_ + first, count * shape_.channels);
      sum_ += static_cast<uint32_t>(sums_[pixel + count]) - static_cast<uint32_t>(sums_[pixel]);
      const int32_t* before = sums_ + shape_.pixels() + 1 + pixel;
      for (int32_t r = before[0]; r < before[count]; ++r) {
        rests_[count_++] = {static_cast<int32_t>(from_[r].k - first + at), from_[r].value};
      }
    }
    OCSQ_INLINE void zeros(int64_t at, int64_t count) const { std::memset(to_ + at, 0, count * shape_.channels); }
    OCSQ_INLINE void done() {
      const int64_t base = w_.base_groups() * kGroup, end = base + w_.tail, depth = w_.depth();
      for (int64_t k = w_.k; k < base; ++k) to_[k] = 0;
      if (w_.tail > 0) add_tail(base);
      for (int64_t k = end; k < depth; ++k) to_[k] = 0;
      a_.rest_count[m_] = count_;
      a_.offset_codes[m_] = static_cast<int32_t>(sum_);
      if (a_.group_offset_codes != nullptr) sum_groups(a_.group_offset_codes + m_ * w_.scale_groups());
    }

   private:
    void sum_groups(int32_t* sums) const {
      const int8_t* bodies = reinterpret_cast<const int8_t*>(to_);
      const int64_t size = w_.group_channels;
      for (int64_t first = 0; first < w_.k; first += size, ++sums) {
        const int64_t count = w_.k - first < size ? w_.k - first : size;
        int32_t sum = 0;
        for (int64_t k = 0; k < count; ++k) sum += bodies[first + k];
        *sums = sum;
      }
      sums -= w_.scale_groups();
      for (int32_t r = 0; r < count_; ++r) sums[rests_[r].k / size] += rests_[r].value;
    }
    // The columns of split channels: codes, and with them rests, a second time.
    void add_tail(int64_t base) {
      const int32_t rests = count_;
      for (int32_t e = 0, r = 0; e < w_.tail; ++e) {
        const int32_t k = w_.tail_index[e];
        to_[base + e] = to_[k];
        sum_ += static_cast<uint32_t>(static_cast<int8_t>(to_[k]));
        while (r < rests && rests_[r].k < k) ++r;
        if (r == rests || rests_[r].k != k) continue;
        rests_[count_++] = {static_cast<int32_t>(base + e), rests_[r].value};
        sum_ += static_cast<uint32_t>(rests_[r].value);
      }
    }

    const Planes& planes_;
    const PatchShape& shape_;
    const PackedWeight& w_;
    const Activations& a_;
    const uint8_t* bodies_ = nullptr;
    const int32_t* sums_ = nullptr;
    const Rest* from_ = nullptr;
    uint8_t* to_ = nullptr;
    Rest* rests_ = nullptr;
    int64_t m_ = 0;
    int32_t count_ = 0;
    uint32_t sum_ = 0;
  };
};

}  // namespace
}  // namespace ocsquant
