// The gates of LSTM and GRU, one row in one pass. Included inside a target region, after
// nonlinearity_impl.h.
#pragma once

namespace ocsquant {
namespace {

// Each is called for Simd::W hidden units at a time.
struct LstmCell {
  const float *x, *r;  // [4][hidden]: input, forget, cell and output gate, of the input and of the last output
  float *c, *y;        // [hidden]
  int64_t hidden;

  OCSQ_INLINE Simd::F gate(int64_t at, int which) const {
    return Simd::add(Simd::load(x + which * hidden + at), Simd::load(r + which * hidden + at));
  }
  OCSQ_INLINE void operator()(int64_t at) const {
    const Simd::F written = Simd::mul(sigmoid(gate(at, 0)), hyperbolic_tangent(gate(at, 2)));
    const Simd::F cell = Simd::add(Simd::mul(sigmoid(gate(at, 1)), Simd::load(c + at)), written);
    Simd::store(c + at, cell);
    Simd::store(y + at, Simd::mul(sigmoid(gate(at, 3)), hyperbolic_tangent(cell)));
  }
};

struct GruCell {
  const float *x, *r;  // [3][hidden]: reset, update and new gate
  float* h;            // [hidden], the last output, becomes the next
  int64_t hidden;

  OCSQ_INLINE Simd::F gate(const float* p, int which, int64_t at) const { return Simd::load(p + which * hidden + at); }

  OCSQ_INLINE void operator()(int64_t at) const {
    const Simd::F reset = sigmoid(Simd::add(gate(x, 0, at), gate(r, 0, at)));
    const Simd::F update = sigmoid(Simd::add(gate(x, 1, at), gate(r, 1, at)));
    const Simd::F fresh = hyperbolic_tangent(Simd::add(gate(x, 2, at), Simd::mul(reset, gate(r, 2, at))));
    Simd::store(h + at, Simd::add(fresh, Simd::mul(update, Simd::sub(Simd::load(h + at), fresh))));
  }
};

inline void lstm_cell(const float* x, const float* r, int64_t hidden, float* c, float* y) {
  int64_t at = 0;
  for (const LstmCell cell{x, r, c, y, hidden}; at + Simd::W <= hidden; at += Simd::W) cell(at);
  const int64_t left = hidden - at;
  if (left == 0) return;
  float px[4 * Simd::W] = {}, pr[4 * Simd::W] = {}, pc[Simd::W] = {}, py[Simd::W];
  for (int g = 0; g < 4; ++g) {
    std::memcpy(px + g * Simd::W, x + g * hidden + at, left * sizeof(float));
    std::memcpy(pr + g * Simd::W, r + g * hidden + at, left * sizeof(float));
  }
  std::memcpy(pc, c + at, left * sizeof(float));
  LstmCell{px, pr, pc, py, Simd::W}(0);
  std::memcpy(c + at, pc, left * sizeof(float));
  std::memcpy(y + at, py, left * sizeof(float));
}

inline void gru_cell(const float* x, const float* r, int64_t hidden, float* h) {
  int64_t at = 0;
  for (const GruCell cell{x, r, h, hidden}; at + Simd::W <= hidden; at += Simd::W) cell(at);
  const int64_t left = hidden - at;
  if (left == 0) return;
  float px[3 * Simd::W] = {}, pr[3 * Simd::W] = {}, ph[Simd::W] = {};
  for (int g = 0; g < 3; ++g) {
    std::memcpy(px + g * Simd::W, x + g * hidden + at, left * sizeof(float));
    std::memcpy(pr + g * Simd::W, r + g * hidden + at, left * sizeof(float));
  }
  std::memcpy(ph, h + at, left * sizeof(float));
  GruCell{px, pr, ph, Simd::W}(0);
  std::memcpy(h + at, ph, left * sizeof(float));
}

}  // namespace
}  // namespace ocsquant
