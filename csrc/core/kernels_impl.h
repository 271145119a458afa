// Everything that is written once over Simd, and the table of one instruction set. Included inside a target region,
// after simd_*.h and the standard headers.
#pragma once

#include "dequantize_impl.h"
#include "nonlinearity_impl.h"
#include "rowwise_impl.h"
//
#include "fake_quantize_impl.h"
#include "fixed_steps_impl.h"
#include "kurtosis_impl.h"
#include "recurrent_impl.h"
#include "stored_impl.h"
//
#include "unpack_impl.h"
//
#include "rests_impl.h"
//
#include "linear_impl.h"
//
#include "grouped_impl.h"
#include "patches_impl.h"
//
#include "depthwise_impl.h"

namespace ocsquant {
namespace {

template <class Tile>
constexpr Kernels kernels(const char* isa) {
  return {isa,
          linear_kernels<Tile>(),
          convolution_kernels<Tile>(),
          {fake_quantize_split, fake_quantize_split_backward},
          {fake_quantize_clip, fake_quantize_clip_backward},
          {kurtosis, add_kurtosis_gradient},
          {lstm_cell, gru_cell},
          nonlinear,
          dequantize_row,
          widen,
          narrow};
}

}  // namespace
}  // namespace ocsquant
