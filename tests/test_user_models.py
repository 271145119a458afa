"""What users' models do besides holding layers: replaced forwards, adapters, weights read by a parent, odd types."""

import pytest
import torch
from test_quantize import mlp, reasons
from torch import nn

import ocsquant
from ocsquant.nn import QuantizedLinear


@pytest.mark.parametrize("width", [127, 129, 130, 131, 132])
def test_another_input_width_is_refused(width):
    layer = ocsquant.quantize(nn.Linear(128, 64))
    with pytest.raises(ocsquant.ArgumentError, match=r"input must be \[\.\.\., 128\], got"):
        layer(torch.randn(2, width))
    assert layer(input=torch.randn(2, 128)).shape == (2, 64)


def test_forwards_replaced_on_the_instance_stay():
    for simulate in (False, True):
        model = mlp()
        model[0].forward = lambda x: torch.full((len(x), 64), 7.0)
        ocsquant.quantize(model, simulate=simulate)
        assert "replaced on the instance" in reasons(model)["0"]
        assert (model[0](torch.randn(2, 128)) == 7.0).all()


def test_every_reference_to_a_layer_sees_the_change():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(128, 128)
            self.calls = [self.fc]

        def forward(self, x):
            return self.calls[0](x)

    model = Listed()
    x = torch.randn(3, 128)
    expected = model(x)
    ocsquant.quantize(model)
    assert not torch.equal(model(x), expected)
    wrapped = torch.compile(nn.Linear(128, 128), backend="eager")
    ocsquant.quantize(wrapped)
    assert isinstance(wrapped._orig_mod, QuantizedLinear)
    assert torch.equal(wrapped(x), wrapped._orig_mod(x))


def test_a_pattern_covers_what_is_inside():
    model = nn.ModuleDict({"encoder": nn.Sequential(nn.Linear(128, 128)), "head": nn.Linear(128, 128)})
    ocsquant.quantize(model, ignore=["encoder"])
    assert type(model["encoder"][0]) is nn.Linear
    assert isinstance(model["head"], QuantizedLinear)


def test_trainable_adapters_stay_trainable():
    model = nn.ModuleDict({"base": nn.Linear(256, 256).requires_grad_(False), "lora": nn.Linear(256, 128)})
    ocsquant.quantize(model)
    assert isinstance(model["base"], QuantizedLinear)
    assert [name for name, _ in model.named_parameters()] == ["lora.weight", "lora.bias"]
    assert "trainable" in reasons(model)["lora"]


def test_a_layer_whose_weight_the_parent_reads_stays_float():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.called = nn.Linear(128, 128), nn.Linear(128, 128)

        def forward(self, x):
            return nn.functional.linear(self.called(x), self.read.weight, self.read.bias)

    model = Reader()
    ocsquant.quantize(model)
    assert "Reader reads its weight" in reasons(model)["read"]
    assert isinstance(model.called, QuantizedLinear)


def test_weights_of_other_types_are_listed():
    model = nn.ModuleDict({"l": nn.Linear(128, 128), "b": nn.Bilinear(8, 8, 8), "t": nn.ConvTranspose2d(3, 3, 3)})
    ocsquant.quantize(model)
    assert reasons(model)["b"] == reasons(model)["t"] == "no quantized form for this type"


def test_too_many_inputs_for_exact_sums_are_skipped_by_name():
    model = nn.Sequential(nn.Linear(131080, 16), nn.Linear(128, 64))
    ocsquant.quantize(model)
    assert "int32" in reasons(model)["0"]


def test_double_input_and_type_conversion():
    layer = ocsquant.quantize(nn.Linear(128, 64))
    x = torch.randn(3, 128)
    assert torch.equal(layer.double()(x.double()).float(), layer(x))
    assert layer.type(torch.float16).packed.dtype == torch.uint8


def test_nan_bias_is_refused_by_name():
    model = mlp()
    model[0].bias.data[2] = torch.inf
    with pytest.raises(ocsquant.NonFiniteError, match=r"0\.bias"):
        ocsquant.quantize(model)


def test_a_second_quantize_keeps_the_first_record():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    ocsquant.quantize(model, ignore=["1"])
    ocsquant.quantize(model)
    report = ocsquant.report(model)
    assert [layer.scheme for layer in report.layers] == ["W8A8", "W8A8"]
    assert report.total_before == 2 * 4 * (128 * 128 + 128)


def test_overrides_within_overrides_are_refused():
    with pytest.raises(ocsquant.ArgumentError, match="without ignore and overrides"):
        ocsquant.quantize(mlp(), overrides={"0": ocsquant.Recipe(ignore=["x"])})
