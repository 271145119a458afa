// What the kinds of convolutions share: where the memory of a call lies.
#pragma once
#include "linear.h"

namespace ocsquant {

constexpr int64_t kSerialProducts = 500'000;  // below, a second thread costs more than it brings

// The tensors of a call, what they hold and how: of one group of channels.
struct Convolution {
  const float* x;
  float* y;
  bool channels_last;  // of both
  int64_t samples, groups, group;
  PatchShape shape;   // of a group's channels
  PackedWeight w;     // the panels that hold the group's outputs
  int64_t before, n;  // columns of `w` before them, and how many they are
  TokenQuantizer how;

  int64_t rows() const { return samples * shape.rows(); }
  // Channels last: of one pixel, input and output.
  int64_t pitch_in() const { return groups * shape.channels; }
  int64_t pitch_out() const { return groups * n; }
  // The group's first value of a sample.
  const float* sample(int64_t i) const {
    return x + i * groups * shape.values() + group * (channels_last ? shape.channels : shape.values());
  }
  float* output(int64_t i) const {
    return y + i * groups * n * shape.rows() + group * (channels_last ? n : n * shape.rows());
  }
  // Whether the rows of the product are those of y.
  bool in_place() const { return channels_last && groups == 1; }
};

// All groups, of one channel each.
void run_depthwise(const Convolution& whole);

}  // namespace ocsquant
