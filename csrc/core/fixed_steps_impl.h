// Rows of floats to codes of a fixed step: calibrated inputs, whose scales are multiplied in. Included inside a target
// region, after rowwise_impl.h.
#pragma once

namespace ocsquant {
namespace {

// Codes of step 1 of the scaled values; kOutliers: some may be beyond +-limit, and are counted. What is beyond 16 bits
// and what is no number at all get the smallest code there is, so that one comparison of 16-bit codes finds both:
// then only kAnySize, which looks at every float, can tell what they are.
template <bool kOutliers, bool kAnySize, class Out>
struct RowFixedCodes {
  Out out;
  const float *inverse, *shift;
  Simd::I largest;
  Simd::Codes least, offset, bottom, top;
  int limit;
  OutlierCount outliers;
  // `most`: what a code of a symmetric range may be.
  OCSQ_INLINE RowFixedCodes(const Out& to, const TokenQuantizer& how, int bound, int most)
      : out(to),
        inverse(how.inverse),
        shift(how.shift),
        largest(Simd::zero_i()),
        least(Simd::set1_codes(0)),
        offset(Simd::set1_codes(how.symmetric ? 0 : bound + 1)),
        bottom(Simd::set1_codes(how.symmetric ? -most : -bound - 1)),
        top(Simd::set1_codes(how.symmetric ? most : bound)),
        limit(how.symmetric ? bound : bound + 1),
        outliers() {}

  // Whether all codes are those of their values.
  OCSQ_INLINE bool valid() const {
    if constexpr (kAnySize) return bits_to_float(Simd::reduce_max(largest)) <= std::numeric_limits<float>::max();
    return Simd::all_greater(least, Simd::set1_codes(kNoCode));
  }
  template <class Load>
  OCSQ_INLINE void block(int64_t j, const Load& load) {
    put_block<kOutliers>(
        out, j, limit,
        [&](int64_t at) __attribute__((always_inline)) {
          Simd::F x = load(at);
          if constexpr (kAnySize) {
            largest = Simd::max_i(largest, Simd::abs_bits(x));
            x = Simd::max(Simd::set1(kNoCode + 1), Simd::min(Simd::set1(-kNoCode - 1), x));
          }
          return Simd::round_to_int(x);
        },
        [&](Simd::Codes& codes) __attribute__((always_inline)) {
          least = Simd::min_codes(least, codes);
          codes = Simd::max_codes(bottom, Simd::min_codes(top, Simd::sub_codes(codes, offset)));
        },
        outliers);
  }
  OCSQ_INLINE void row(const float* x, int64_t k, const TokenQuantizer& how) {
    const int64_t whole = k / kLanes * kLanes;
    for (int64_t j = 0; j < whole; j += kLanes) {
      if (shift != nullptr) {
        block(j, [&](int64_t at) __attribute__((always_inline)) {
          const Simd::F centred = Simd::sub(Simd::load(x + j + at), Simd::load(shift + j + at));
          return Simd::mul(centred, Simd::load(inverse + j + at));
        });
      } else if (inverse != nullptr) {
        block(j, [&](int64_t at) __attribute__((always_inline)) {
          return Simd::mul(Simd::load(x + j + at), Simd::load(inverse + j + at));
        });
      } else {
        block(j, [&](int64_t at) __attribute__((always_inline)) { return Simd::load(x + j + at); });
      }
    }
    if (whole == k) return;
    float last[kLanes] = {};
    scale_row(x, how, whole, k, last);
    block(whole, [&](int64_t at) __attribute__((always_inline)) { return Simd::load(last + at); });
  }

 private:
  static constexpr int kNoCode = std::numeric_limits<int16_t>::min();
};

// Whether the row has codes of step 1.
template <bool kAnySize, class Out>
OCSQ_INLINE bool round_row_fixed(const float* x, int64_t k, const TokenQuantizer& how, Out& out) {
  const int limit = (1 << (how.bits - 1)) - 1;
  if (how.max_outliers > 0) {
    RowFixedCodes<true, kAnySize, Out> codes(out, how, limit, kMaxFixedCode);
    codes.row(x, k, how);
    if (!codes.valid()) return false;
    if (codes.outliers.total() <= how.max_outliers) {
      out = codes.out;
      return true;
    }
  }
  RowFixedCodes<false, kAnySize, Out> codes(out, how, limit, limit);
  codes.row(x, k, how);
  if (codes.valid()) out = codes.out;
  return codes.valid();
}

template <class Out>
__attribute__((noinline)) bool round_row_of_any_size(const float* x, int64_t k, const TokenQuantizer& how, Out& out) {
  return round_row_fixed<true>(x, k, how, out);
}

// One token to codes of step 1; returns that step, NaN for a row with NaN or Inf (codes 0).
template <class Out>
OCSQ_INLINE float quantize_row_fixed(const float* x, int64_t k, const TokenQuantizer& how, Out& out) {
  if (round_row_fixed<false>(x, k, how, out)) return 1.0f;
  Out any = out;  // the one whose address is taken: the other's members stay in registers
  const bool finite = round_row_of_any_size(x, k, how, any);
  out = any;
  if (finite) return 1.0f;
  out.zeros(k);
  return std::numeric_limits<float>::quiet_NaN();
}

}  // namespace
}  // namespace ocsquant
