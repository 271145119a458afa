"""The modules that replace a network's own. Plain buffers, no tensor subclass."""

from ocsquant.nn.attention import QuantizedMultiheadAttention
from ocsquant.nn.convolution import QuantizedConv
from ocsquant.nn.fused import FusedNonlinearity
from ocsquant.nn.linear import QuantizedLinear
from ocsquant.nn.quantized import Quantized, quantized_modules
from ocsquant.nn.recurrent import RECURRENT_FORMS, QuantizedGRU, QuantizedLSTM, QuantizedRecurrent
from ocsquant.nn.shared import SharedInput
from ocsquant.nn.simulated import SimulatedLinear
from ocsquant.nn.split import SplitConv, SplitLinear
from ocsquant.nn.tied import TiedEmbedding
from ocsquant.nn.weight_only import FORMS, StoredWeight, WeightOnly, form_of

__all__ = [
    "FORMS",
    "RECURRENT_FORMS",
    "FusedNonlinearity",
    "Quantized",
    "QuantizedConv",
    "QuantizedGRU",
    "QuantizedLSTM",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "QuantizedRecurrent",
    "SharedInput",
    "SimulatedLinear",
    "SplitConv",
    "SplitLinear",
    "StoredWeight",
    "TiedEmbedding",
    "WeightOnly",
    "form_of",
    "quantized_modules",
]
