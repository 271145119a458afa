// Every schema of the library; kernels register themselves in the file that holds them.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(ocsquant, m) {
  m.def(
      "pack_weight(Tensor codes, Tensor? tail=None, int weight_bits=8, Tensor? zero=None, Tensor? levels=None, "
      "int group_size=0) -> Tensor");
  m.def(
      "unpack_weight(Tensor packed, int n, int k, int e=0, int weight_bits=8, Tensor? zero=None, Tensor? levels=None, "
      "int group_size=0) -> (Tensor, Tensor)");
  m.def(
      "quantized_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias=None, Tensor? tail_index=None, "
      "int activation_bits=8, int max_outliers=16, float outlier_threshold=4.0, int group_size=0) -> Tensor");
  // For weights below 8 bits: three arguments more cost every call a tenth of nn.Linear's, even as defaults. With
  // a nonlinearity: every argument there is.
  m.def(
      "quantized_linear_narrow(Tensor x, Tensor packed, Tensor scale, Tensor? bias=None, Tensor? tail_index=None, "
      "int activation_bits=8, int max_outliers=16, float outlier_threshold=4.0, int group_size=0, "
      "int weight_bits=8, Tensor? zero=None, Tensor? levels=None) -> Tensor");
  m.def(
      "quantized_linear_nonlinear(Tensor x, Tensor packed, Tensor scale, Tensor? bias, Tensor? tail_index, "
      "int activation_bits, int max_outliers, float outlier_threshold, int group_size, int weight_bits, Tensor? zero, "
      "Tensor? levels, str nonlinearity) -> Tensor");
  // Layers that read the same x, which is quantized once; weights of one form, without tails.
  m.def(
      "quantized_linears(Tensor x, Tensor[] packed, Tensor[] scale, Tensor?[] bias, int activation_bits, "
      "int max_outliers, float outlier_threshold, int group_size, int weight_bits, Tensor?[] zero, Tensor?[] levels, "
      "str[] nonlinearity) -> Tensor[]");
  // The same kernel under a name that carries an autograd formula: registering one costs a call 5 us even when unused.
  m.def(
      "quantized_linear_train(Tensor x, Tensor packed, Tensor scale, Tensor? bias=None, Tensor? tail_index=None, "
      "int activation_bits=8, int max_outliers=16, float outlier_threshold=4.0, int group_size=0, "
      "int weight_bits=8, Tensor? zero=None, Tensor? levels=None) -> Tensor");
  m.def(
      "scale_folded_linear(Tensor x, Tensor packed, Tensor scale, Tensor input_inverse, Tensor? input_shift=None, "
      "Tensor? bias=None, Tensor? tail_index=None, int activation_bits=8, int max_outliers=0, bool symmetric=True) "
      "-> Tensor");
  m.def(
      "scale_folded_linear_nonlinear(Tensor x, Tensor packed, Tensor scale, Tensor input_inverse, "
      "Tensor? input_shift, Tensor? bias, Tensor? tail_index, int activation_bits, bool dynamic, int max_outliers, "
      "float outlier_threshold, bool symmetric, int weight_bits, Tensor? zero, Tensor? levels, str nonlinearity) "
      "-> Tensor");
  m.def(
      "scale_folded_linear_train(Tensor x, Tensor packed, Tensor scale, Tensor input_inverse, Tensor? "
      "input_shift=None, "
      "Tensor? bias=None, Tensor? tail_index=None, int activation_bits=8, bool dynamic=False, int max_outliers=0, "
      "float outlier_threshold=4.0, bool symmetric=True, int weight_bits=8, Tensor? zero=None, "
      "Tensor? levels=None) -> Tensor");
  m.def(
      "quantized_lstm(Tensor gates, Tensor h, Tensor c, Tensor packed, Tensor scale, Tensor? bias=None, "
      "Tensor? tail_index=None, int activation_bits=8, int max_outliers=16, float outlier_threshold=4.0, "
      "int group_size=0, int weight_bits=8, Tensor? zero=None, Tensor? levels=None, Tensor? batch_sizes=None, "
      "bool reverse=False, Tensor? projection_packed=None, Tensor? projection_scale=None, "
      "Tensor? projection_tail_index=None, int projection_group_size=0, int projection_weight_bits=8, "
      "Tensor? projection_zero=None, Tensor? projection_levels=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "quantized_gru(Tensor gates, Tensor h, Tensor packed, Tensor scale, Tensor? bias=None, "
      "Tensor? tail_index=None, int activation_bits=8, int max_outliers=16, float outlier_threshold=4.0, "
      "int group_size=0, int weight_bits=8, Tensor? zero=None, Tensor? levels=None, Tensor? batch_sizes=None, "
      "bool reverse=False) -> (Tensor, Tensor)");
  m.def(
      "quantized_conv2d(Tensor x, Tensor packed, Tensor scale, Tensor? bias=None, Tensor? tail_index=None, "
      "int kernel_h=1, int kernel_w=1, int stride_h=1, int stride_w=1, int padding_h=0, int padding_w=0, "
      "int dilation_h=1, int dilation_w=1, int activation_bits=8, int max_outliers=16, float outlier_threshold=4.0, "
      "int weight_bits=8, Tensor? zero=None, Tensor? levels=None, int groups=1, Tensor? input_inverse=None, "
      "Tensor? input_shift=None, str nonlinearity='none', Tensor? residual=None, int group_size=0) -> Tensor");
  m.def("nonlinear(Tensor x, str nonlinearity) -> Tensor");
  m.def("pack_codes(Tensor codes, int bits) -> Tensor");
  m.def(
      "dequantize_weight(Tensor packed, Tensor scale, int k, int bits, int group_size, Tensor? zero=None, "
      "Tensor? levels=None, Tensor? rows=None) -> Tensor");
  m.def("fake_quantize_split(Tensor x, Tensor scale, Tensor splits, int bits) -> Tensor");
  m.def(
      "fake_quantize_split_backward(Tensor grad, Tensor x, Tensor scale, Tensor splits, int bits) -> (Tensor, Tensor)");
  m.def("fake_quantize_clip(Tensor x, Tensor clip_neg, Tensor clip_pos, int bits, bool align_zero=False) -> Tensor");
  m.def(
      "fake_quantize_clip_backward(Tensor grad, Tensor x, Tensor clip_neg, Tensor clip_pos, int bits, "
      "bool align_zero=False) -> (Tensor, Tensor, Tensor)");
  m.def("kurtosis(Tensor y) -> Tensor");
  m.def("kurtosis_backward(Tensor grad, Tensor y) -> Tensor");
  m.def("kurtosis_inject(Tensor grad, Tensor y, Tensor scale, float weight, float target, Tensor(a!) log) -> Tensor");
  m.def("kurtosis_anchor(Tensor grad, int penalty, Tensor? share=None) -> Tensor");
  m.def("cpu_isa() -> (str, str)");
}
