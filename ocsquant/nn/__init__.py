"""The modules that replace a network's own. Plain buffers, no tensor subclass."""

from ocsquant.nn.attention import QuantizedMultiheadAttention
from ocsquant.nn.linear import QuantizedLinear
from ocsquant.nn.quantized import Quantized
from ocsquant.nn.simulated import FakeQuantizeInput
from ocsquant.nn.split import SplitConv, SplitLinear
from ocsquant.nn.weight_only import FORMS, StoredWeight, WeightOnly, form_of

__all__ = [
    "FORMS",
    "FakeQuantizeInput",
    "Quantized",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "SplitConv",
    "SplitLinear",
    "StoredWeight",
    "WeightOnly",
    "form_of",
]
