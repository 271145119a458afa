"""The Python face of torch.ops.ocsquant: what each operator computes, and what torch must know of it.

The operators raise RuntimeError for wrong arguments: their checks run in C++, once, on every call.
"""

from ocsquant.ops.convolution import quantized_conv2d
from ocsquant.ops.fake_quantize import fake_quantize_clip, fake_quantize_split
from ocsquant.ops.kurtosis import kurtosis
from ocsquant.ops.library import cpu_isa
from ocsquant.ops.linear import quantized_linear, scale_folded_linear
from ocsquant.ops.nonlinear import nonlinear
from ocsquant.ops.recurrent import quantized_gru, quantized_lstm
from ocsquant.ops.weights import dequantize_packed, dequantize_weight, pack_codes, pack_weight, unpack_weight

__all__ = [
    "cpu_isa",
    "dequantize_packed",
    "dequantize_weight",
    "fake_quantize_clip",
    "fake_quantize_split",
    "kurtosis",
    "nonlinear",
    "pack_codes",
    "pack_weight",
    "quantized_conv2d",
    "quantized_gru",
    "quantized_linear",
    "quantized_lstm",
    "scale_folded_linear",
    "unpack_weight",
]
