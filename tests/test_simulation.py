"""`simulate=True` gives the bits of the integer layers, as long as nobody asks for gradients or changes the weights."""

import copy

import pytest
import torch
from torch import nn

import ocsquant
from ocsquant import OCS, PerChannelStatic, PerTensorStatic, PerToken, Recipe, SplitQuant, Weights
from ocsquant.nn import QuantizedLinear, SimulatedLinear

CALIBRATED = {
    "folded": PerChannelStatic(),
    "folded, split": PerChannelStatic(6, max_outliers=16),
    "per tensor": PerTensorStatic(),
    "one sign": PerTensorStatic(symmetric=False),
    "smoothed": ocsquant.Activations(smooth_alpha=0.5, shift=True),
}
RECIPES = {
    "default": Recipe(),
    "plain": Recipe(activations=PerToken(max_outliers=0)),
    "W6A6, split": Recipe(Weights(bits=6, split=OCS(0.05)), PerToken(6)),
    "W4A8": ocsquant.config.SCHEMES["W4A8"],
    "W3, symmetric groups": Recipe(Weights(bits=3, granularity="group", group_size=32)),
    "W2A8": Recipe(Weights(bits=2, split=SplitQuant())),
    "levels": Recipe(Weights(bits=4, codebook="kmeans")),
    **{name: Recipe(activations=activations) for name, activations in CALIBRATED.items()},
}


def inputs(rows=9, columns=200):
    x = torch.randn(rows, columns) * torch.linspace(0.2, 3, columns)
    x[0] = 0.0
    x[1, 7] = 400.0
    return x


def pair(recipe, layer=None, x=None):
    """The integer model and its simulation."""
    model = nn.Sequential(layer or nn.Linear(200, 72))
    batches = [inputs() if x is None else x]
    return [
        ocsquant.quantize(copy.deepcopy(model), recipe, calibration=batches, simulate=simulate)
        for simulate in (False, True)
    ]


@torch.no_grad()
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bias", [False, True])
def test_the_simulation_has_the_bits_of_the_integer_layer(name, bias):
    integer, simulated = pair(RECIPES[name], nn.Linear(200, 72, bias))
    assert isinstance(integer[0], QuantizedLinear)
    assert isinstance(simulated[0], SimulatedLinear)
    x = inputs()
    assert torch.equal(simulated(x), integer(x))
    assert torch.equal(simulated(x.reshape(3, 3, 200)), integer(x.reshape(3, 3, 200)))
    assert torch.equal(simulated(x[:0]), integer(x[:0]))


@torch.no_grad()
def test_sums_beyond_float32s_whole_numbers():
    layer, x = nn.Linear(4000, 72, False), torch.rand(4, 4000)
    layer.weight.uniform_(0.0, 1.0)
    integer, simulated = pair(Recipe(), layer, x)
    assert torch.equal(simulated(x), integer(x))
    rounded = nn.functional.linear(simulated[0]._rounded(x), simulated[0].weight)
    assert not torch.equal(rounded, integer(x))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("from_the_start", [False, True])
def test_half_precision_keeps_the_scales(dtype, from_the_start):
    layer = nn.Linear(200, 72, from_the_start)  # a simulated layer's bias is a parameter: cast with the model
    x = inputs().clamp(-9, 9)
    if from_the_start:
        layer, x = layer.to(dtype), x.to(dtype)
    integer, simulated = (model.to(dtype) for model in pair(Recipe(Weights(bits=4)), layer, x))
    assert simulated[0].scale.dtype == torch.float32
    assert torch.equal(simulated(x.to(dtype)), integer(x.to(dtype)))


def test_gradients_and_changed_weights_take_the_float_product():
    integer, simulated = pair(Recipe())
    x = inputs().requires_grad_()
    y = simulated(x)
    torch.testing.assert_close(y, integer(x), rtol=1e-4, atol=1e-3)
    y.sum().backward()
    assert simulated[0].weight.grad.abs().sum() > 0
    with torch.no_grad():
        before = simulated(x)
        simulated[0].weight.mul_(2.0)
        simulated[0].bias.mul_(2.0)
        torch.testing.assert_close(simulated(x), 2 * before, rtol=1e-4, atol=1e-3)


def test_a_simulated_layer_copies_and_has_the_entries_of_a_float_one():
    _, simulated = pair(Recipe())
    assert set(simulated.state_dict()) == {"0.weight", "0.bias"}
    x = inputs()
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(simulated)(x), simulated(x))
    with pytest.raises(ocsquant.NothingToQuantizeError, match="forward of its own"):
        ocsquant.quantize(simulated)
