// The seam between tensors and loops: plain pointers and sizes, no torch header, no error state.
// One table of functions per instruction set, chosen once per process; all tables give the same bits.
#pragma once
#include <cstdint>

#include "clip_grid.h"
#include "codes.h"
#include "patches.h"

namespace ocsquant {

// Output columns in one panel of a packed weight, and input channels in one group of it (see pack.h).
constexpr int64_t kPanel = 64;
constexpr int64_t kGroup = 4;
constexpr int64_t kGroupBytes = kPanel * kGroup;
// Groups that 16-bit sums may run over before they are widened; a packed weight holds one bound for each (see pack.h).
constexpr int64_t kSpan = 4;
// Groups of a weight below 8 bits that are bytes at a time.
constexpr int64_t kUnpackedGroups = 256;
// What is added to a weight code of 8 bits when it is packed, so that the byte is unsigned.
constexpr int kOffset = 128;
// 131072 * 128 * 127 < 2^31: the int32 sums of a row cannot overflow up to this many columns, tail included.
constexpr int64_t kMaxDepth = 131072;
constexpr int64_t kMaxOutliers = 64;
// Keeps every activation code inside int16 up to kMaxDepth: 127 * sqrt(K) / threshold (methods: run-time OCS).
constexpr float kMinOutlierThreshold = 2.0f;

enum class Float : int8_t { f32, bf16 };

// What follows a layer; gelu is x Phi(x), gelu_tanh its approximation by tanh.
enum class Nonlinearity : int8_t { none, relu, gelu, gelu_tanh, silu, sigmoid, tanh };

// Codes of a fixed step end here, and its layers at half kMaxDepth: sums with kMaxOutliers such codes still fit int32.
constexpr int kMaxFixedCode = 32512;
constexpr int64_t kMaxFixedDepth = kMaxDepth / 2;

// How one token becomes integers: step = min(absmax, threshold * rms) / (2^(bits-1) - 1), at most max_outliers codes
// beyond the range. max_outliers = 0 is plain dynamic quantization.
struct TokenQuantizer {
  int bits;
  int max_outliers;
  float threshold;
  const float* inverse = nullptr;  // [k]: quantize (x - shift) * inverse instead of x
  const float* shift = nullptr;    // [k], or null: 0
  bool fixed = false;              // step 1: codes are rint of that, all clamped if more than max_outliers lie beyond
  bool symmetric = true;           // false, if fixed: codes are rint of that within 0..2^bits - 1, less 2^(bits-1)
};

// What a code keeps beyond int8: code = body + rest, at column k of the packed weight.
struct Rest {
  int32_t k;
  int32_t value;
};

// A packed weight and what follows its product, immutable: n x k codes and n x tail codes of split channels (pack.h has
// the layout).
struct PackedWeight {
  const uint8_t* packed;
  int64_t n, k, tail;
  const int32_t* tail_index;       // [tail], ascending: the input channel each tail column adds to
  const float* scale;              // [n], or [scale_groups()][n]
  const float* bias;               // [n] or null
  int64_t group_channels = 0;      // input channels that share a scale, a multiple of kSpan * kGroup; 0: all
  int bits = 8;                    // that a code takes: 8, 6, 4 or 2; of the tail always 8
  const uint8_t* zero = nullptr;   // [scale_groups()][n], below 8 bits: subtracted from a code; null: 2^(bits-1)
  const int8_t* levels = nullptr;  // [kMaxEntries], below 8 bits: what a code stands for instead, or null
  Nonlinearity nonlinearity = Nonlinearity::none;
  // Where what is added to an output before its nonlinearity lies, in floats from where the output goes; 0: nowhere.
  // For float32 without group scales.
  int64_t residual = 0;
  int64_t scale_groups() const { return group_channels > 0 ? (k + group_channels - 1) / group_channels : 1; }
  int64_t base_groups() const {
    return bits == 8 ? (k + kGroup - 1) / kGroup : (k + kSpan * kGroup - 1) / (kSpan * kGroup) * kSpan;
  }
  int64_t groups() const { return base_groups() + (tail + kGroup - 1) / kGroup; }
  int64_t code_blocks() const { return base_groups() * bits / 8 + groups() - base_groups(); }
  int64_t depth() const { return groups() * kGroup; }
  int64_t panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t spans() const { return (groups() + kSpan - 1) / kSpan; }
  int64_t bound_blocks() const { return (spans() + kGroupBytes - 1) / kGroupBytes; }
  // What the bytes that are multiplied have in them beside the codes: the least power of two that makes them unsigned.
  int offset_bits() const {
    const bool wide = bits == 8 || levels != nullptr || tail > 0;
    return wide ? 7 : zero != nullptr ? bits : bits - 1;
  }
  int offset() const { return 1 << offset_bits(); }
  int64_t panel_blocks() const { return code_blocks() + bound_blocks(); }
  int64_t panel_bytes() const { return panel_blocks() * kGroupBytes; }
};

// Quantized tokens as one instruction set wants them, in tiles of row_tile rows.
struct Activations {
  uint8_t* codes;               // [rows][row_bytes], a tile's rows together
  float* step;                  // [rows]; NaN for a row that held NaN or Inf
  Rest* rests;                  // [rows][rest_capacity]
  int32_t* rest_count;          // [rows]
  int32_t* offset_codes;        // [rows]: the sum of the codes whose products still contain the weights' offset
  int32_t* group_offset_codes;  // [rows][scale_groups()]: the same group by group; null without group scales
  int64_t rows;
  int64_t row_bytes;
  int64_t rest_capacity;
};

struct LinearKernels {
  int64_t row_tile;
  int64_t row_block;  // rows whose partial sums multiply() keeps at a time
  int64_t (*row_bytes)(int64_t depth);
  int64_t (*rest_capacity)(int64_t depth, int max_outliers);
  // Quantizes rows [first, last) of x (first a multiple of row_tile); scratch from quantize_scratch_bytes().
  void (*quantize)(const void* x, Float dtype, const TokenQuantizer& how, const PackedWeight& w, const Activations& a,
                   int64_t first, int64_t last, void* scratch);
  // y[m][n] for rows [first, last) and one panel; scratch holds kUnpackedGroups groups, then row_block * kPanel int32,
  // for group scales twice that.
  void (*multiply)(const Activations& a, const PackedWeight& w, void* y, Float dtype, int64_t first, int64_t last,
                   int64_t panel, uint8_t* scratch);
  void (*multiply_groups)(const Activations& a, const PackedWeight& w, void* y, Float dtype, int64_t first,
                          int64_t last, int64_t panel, uint8_t* scratch);
};

struct ConvolutionKernels {
  // Of one sample's codes as the instruction set wants them, a multiple of 64.
  int64_t (*plane_bytes)(const PatchShape& shape, int max_outliers);
  // A sample to codes; returns the step. Scratch holds kPlanePixels pixels where the values lie channels first. Where
  // the step is fixed, how.inverse and how.shift are repeated for pixel_period() pixels.
  float (*quantize_plane)(const float* x, const PatchShape& shape, bool channels_first, const TokenQuantizer& how,
                          const PlaneBounds& bounds, float* scratch, uint8_t* plane);
  // to[c][r] = from[r][c], rows of each `pitch` apart.
  void (*transpose)(const float* from, int64_t from_pitch, int64_t rows, int64_t columns, float* to, int64_t to_pitch);
  // The most codes beyond a byte that any pixel has.
  int64_t (*largest_outliers)(const uint8_t* plane, const PatchShape& shape);
  // Patches from `row` on, counted over all samples, become rows 0..rows of a; scratch as for quantize().
  void (*place_patches)(const Planes& planes, const PatchShape& shape, int64_t row, const PackedWeight& w,
                        const Activations& a, int64_t rows, void* scratch);
  // Of one channel alone, in a shape with channels 1: the bytes of its codes; codes as quantize_plane() has them; and
  // y[out_h][out_w] = the sum of taps[kernel_h][kernel_w] times codes, times factor, plus *bias if there is one.
  int64_t (*channel_bytes)(const PatchShape& shape, int max_outliers);
  float (*quantize_channel)(const float* x, const PatchShape& shape, bool channels_first, const TokenQuantizer& how,
                            const PlaneBounds& bounds, float* scratch, uint8_t* plane);
  int64_t (*channel_scratch_bytes)(const PatchShape& shape);
  void (*convolve_channel)(const uint8_t* plane, const PatchShape& shape, const int32_t* taps, float factor,
                           const float* bias, void* scratch, float* y);
};

struct FakeQuantizeSplitKernels {
  // y = clamp(rint(x / scale), -limit_j, limit_j) * scale over one row; limit_j = n_j (2^(bits-1) - 1).
  void (*forward)(const float* x, const float* limit, float scale, int64_t k, float* y);
  // dx and the row's gradient of the scale (straight-through; methods: fake_quantize_split).
  float (*backward)(const float* grad, const float* x, const float* limit, float scale, int64_t k, float* dx);
};

// Over some values: the sums of the gradients of those at or below the grid, of those at or above it, and of gradient
// times rounding error in steps, (u - rint(u)), of those inside.
struct ClipSums {
  float below, above, inside;
};

struct FakeQuantizeClipKernels {
  // y = the nearest level of the grid, over n values.
  void (*forward)(const float* x, const ClipGrid& grid, int64_t n, float* y);
  // dx = grad inside the grid, 0 elsewhere.
  ClipSums (*backward)(const float* grad, const float* x, const ClipGrid& grid, int64_t n, float* dx);
};

struct KurtosisKernels {
  // K = m4 / m2^2 of d values, the central moments in float32; 0 for a row without variance, NaN for one with NaN or
  // Inf.
  float (*forward)(const float* y, int64_t d);
  // out = grad + factor * dK/dy where K > target, else grad (null: 0); returns K.
  float (*add_gradient)(const float* grad, const float* y, int64_t d, float factor, float target, float* out);
};

struct RecurrentKernels {
  // One row. x and r: [4][hidden] input, forget, cell and output gate before their nonlinearity, what the input and
  // what the last output add to them; c [hidden] becomes the next cell state, y [hidden] is the output.
  void (*lstm_cell)(const float* x, const float* r, int64_t hidden, float* c, float* y);
  // One row. x and r: [3][hidden] reset, update and new gate; h [hidden], the last output, becomes the next.
  void (*gru_cell)(const float* x, const float* r, int64_t hidden, float* h);
};

struct Kernels {
  const char* isa;
  LinearKernels linear;
  ConvolutionKernels convolution;
  FakeQuantizeSplitKernels fake_quantize_split;
  FakeQuantizeClipKernels fake_quantize_clip;
  KurtosisKernels kurtosis;
  RecurrentKernels recurrent;
  // y[n] in place, with what is behind it up to 64 bytes.
  void (*nonlinear)(Nonlinearity which, int64_t n, float* y);
  void (*dequantize_row)(const CodedWeight& w, int64_t row, float* y);  // y[k]
  void (*widen)(const uint16_t* x, int64_t n, float* y);                // bfloat16 to float32
  void (*narrow)(const float* x, int64_t n, uint16_t* y);               // float32 to bfloat16, to nearest even
};

extern const Kernels kScalar;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;
extern const Kernels kAvx512Vnni;
extern const Kernels kAmxInt8;
#endif

// Codes of a row up to whole spans, and how far the rows of a tile are apart before they are placed; a Tile that places
// row by row has notes there instead.
inline int64_t padded_depth(const PackedWeight& w) {
  constexpr int64_t kChannels = kSpan * kGroup;
  return (w.depth() + kChannels - 1) / kChannels * kChannels;
}
inline int64_t code_pitch(const PackedWeight& w) {
  return (w.k + 63) / 64 * 64 + padded_depth(w) - w.base_groups() * kGroup;
}

// Bytes that quantize() needs beside its output.
inline int64_t quantize_scratch_bytes(const PackedWeight& w, int64_t row_tile) {
  const int64_t codes = (row_tile * code_pitch(w) + 31) / 32 * 32;
  return codes * static_cast<int64_t>(sizeof(int16_t)) + (w.k + 63) / 64 * 64 * static_cast<int64_t>(sizeof(float));
}

// The best table this CPU runs, or the level named by OCSQUANT_ISA. Null when that name is unknown or the CPU lacks it;
// `why` then (and always) says in words what was found.
const Kernels* select_kernels(const char* wanted, const char** why);

}  // namespace ocsquant
