"""The modules that replace a network's own. Plain buffers, no tensor subclass."""

from ocsquant.nn.attention import QuantizedMultiheadAttention
from ocsquant.nn.linear import QuantizedLinear
from ocsquant.nn.simulated import FakeQuantizeInput
from ocsquant.nn.split import SplitConv, SplitLinear

__all__ = ["FakeQuantizeInput", "QuantizedLinear", "QuantizedMultiheadAttention", "SplitConv", "SplitLinear"]
