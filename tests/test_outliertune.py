import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import ocsquant
from ocsquant import OCS, Activations, PerChannelStatic, PerTensorStatic, PerToken, Recipe, Weights
from ocsquant.methods import ocs
from ocsquant.methods.outliertune import input_transform, transformed_codes
from ocsquant.nn import QuantizedLinear


def spread_inputs(m: int, k: int, seed: int = 0) -> Tensor:
    """Channels of different sizes and middles, as behind a LayerNorm."""
    g = torch.Generator().manual_seed(0)
    size, middle = torch.randn(k, generator=g).mul(0.7).exp(), torch.randn(k, generator=g)
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed + 1)) * size + middle * size


def test_the_fold_is_outliertunes():
    """s_k = (max - min) / 2Q, z_k = (max + min) / 2: every calibrated value has a code, the range is used whole."""
    x, w = spread_inputs(50, 40), torch.randn(30, 40)
    t = input_transform(x.amin(0), x.amax(0), w, 8, "channel", None, shift=True)
    assert torch.allclose(t.scale(), (x.amax(0) - x.amin(0)) / 254, rtol=1e-5)
    assert torch.allclose(t.shift, (x.amax(0) + x.amin(0)) / 2)
    codes, step = transformed_codes(x, t, 8, 0, 4.0)
    assert torch.equal(step, torch.ones(50))
    assert codes.amax(0).eq(127).all()
    assert codes.amin(0).eq(-127).all()
    y = (codes @ (w * t.scale()).T) + t.folded_bias(w, None)
    assert (y - x @ w.T).abs().max() < (x.abs() @ w.abs().T).max() / 127


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("scale", ["token", "tensor", "channel"])
def test_without_rounding_the_fold_changes_nothing(alpha, scale):
    x, w = spread_inputs(20, 40).double(), torch.randn(30, 40).double()
    t = input_transform(x.amin(0), x.amax(0), w, 8, scale, alpha, shift=True)
    u = (x - t.shift) * t.inverse
    y = u @ (w * t.scale()).T + w @ t.shift.double()
    assert torch.allclose(y, x @ w.T, rtol=1e-4, atol=1e-4)
    if scale != "token":
        assert abs(float(u.abs().max()) - 127) < 1e-3


def test_smoothquant_balances_inputs_and_weights():
    x, w = spread_inputs(60, 40), torch.randn(30, 40)
    t = input_transform(x.amin(0), x.amax(0), w, 8, "token", 0.5, shift=False)
    inputs, weights = (x * t.inverse).abs().amax(0), (w * t.scale()).abs().amax(0)
    assert (inputs / weights).log().std() < 1e-4


def test_a_dead_channel_takes_no_range_from_the_others():
    x, w = spread_inputs(60, 40), torch.randn(30, 40)
    x[:, 7] = 0.0
    t = input_transform(x.amin(0), x.amax(0), w, 8, "channel", None, shift=True)
    assert t.inverse.isfinite().all()
    assert torch.isclose(t.scale()[7], t.scale().median() / 127, rtol=0.05)
    nothing = input_transform(torch.zeros(5), torch.zeros(5), torch.zeros(3, 5), 8, "channel", 0.5, shift=True)
    assert nothing.inverse.isfinite().all()


def network(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.LayerNorm(256), nn.Linear(256, 128, bias=bias), nn.GELU(), nn.Linear(128, 128)).eval()


def batches(count: int = 4) -> list[Tensor]:
    return [spread_inputs(64, 256, seed=10 * i) for i in range(count)]


RECIPES = {
    "channel": Recipe(activations=PerChannelStatic(8)),
    "channel 6": Recipe(Weights(6), PerChannelStatic(6)),
    "alpha": Recipe(activations=PerChannelStatic(8, smooth_alpha=0.8, shift=False)),
    "split": Recipe(Weights(split=OCS(0.05)), PerChannelStatic(8, max_outliers=4)),
    "budget": Recipe(Weights(6, split=OCS(max_overhead=0.02)), PerChannelStatic(6)),
    "tensor": Recipe(activations=PerTensorStatic(8, max_outliers=2)),
    "smooth": Recipe(activations=Activations(8, 0, smooth_alpha=0.5)),
    "shifted": Recipe(activations=Activations(8, scale="tensor", smooth_alpha=0.5, shift=True)),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("bias", [True, False])
def test_quantized_equals_simulated_and_survives_a_file(name, bias, tmp_path):
    model, x = network(bias), spread_inputs(40, 256, seed=99)
    made = ocsquant.quantize(copy.deepcopy(model), RECIPES[name], calibration=batches())
    simulated = ocsquant.quantize(copy.deepcopy(model), RECIPES[name], calibration=batches(), simulate=True)
    exact = model(x)
    noise = (made(x) - exact).norm() / exact.norm()
    assert noise < (0.2 if "6" in name or name == "budget" else 0.05)
    assert (simulated(x) - made(x)).norm() / exact.norm() < noise / 3
    if not bias:
        assert (made[1].bias is None) == (made[1].input_shift is None)
    assert torch.nn.functional.cosine_similarity(made[1].weight.flatten(), model[1].weight.flatten(), dim=0) > 0.98
    ocsquant.save(made, tmp_path / "file")
    again = ocsquant.load(network(bias), tmp_path / "file")
    assert torch.equal(again(x), made(x))
    assert again[1].activations == made[1].activations
    torch.compiler.reset()  # every case is the same code: dynamo would take them for too many recompilations
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), made(x))


def test_folded_inputs_beat_a_step_per_token_where_channels_differ():
    model, x = network(), spread_inputs(200, 256, seed=99)
    model[0] = nn.Identity()
    exact = model(x)

    def error(recipe: Recipe) -> float:
        made = ocsquant.quantize(copy.deepcopy(model), recipe, calibration=batches(16))
        return float((made(x) - exact).norm() / exact.norm())

    assert error(RECIPES["channel 6"]) < 0.8 * error(Recipe(Weights(6), PerToken(6, max_outliers=0)))


def test_an_input_that_the_fold_would_harm_keeps_a_step_per_token():
    """Tokens of very different sizes: a fixed scale is useless for most of them."""
    model = nn.Sequential(nn.Linear(256, 128)).eval()
    x = torch.randn(512, 256) * torch.exp(torch.randn(512, 1) * 3)
    made = ocsquant.quantize(model, RECIPES["channel"], calibration=[x])
    assert isinstance(made[0], QuantizedLinear)
    assert made[0].input_inverse is None
    (line,) = ocsquant.report(made).layers
    assert line.kernel == "quantized_linear"
    assert line.reason.startswith("inputs per token: output error 0.")


def test_a_single_token_is_nothing_to_judge_a_fixed_scale_by():
    made = ocsquant.quantize(nn.Sequential(nn.Linear(128, 256)), RECIPES["channel"], calibration=[torch.randn(1, 128)])
    assert made[0].input_inverse is None
    empty = ocsquant.Statistics({"0": ocsquant.InputStatistics.empty(128)})
    with pytest.raises(ocsquant.NotCalibratedError, match="no input of '0'"):
        ocsquant.quantize(nn.Sequential(nn.Linear(128, 256)), RECIPES["tensor"], calibration=empty)


def test_a_padded_transformer_encoder():
    layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    batch = {"src": torch.randn(3, 7, 128), "src_key_padding_mask": torch.arange(7) > torch.tensor([[6], [3], [5]])}
    made = ocsquant.quantize(copy.deepcopy(model), RECIPES["tensor"], calibration=[batch])
    assert made.layers[0].linear1.input_inverse is not None
    with ocsquant.calibrate(model) as statistics:
        model(**batch)
    assert model.use_nested_tensor
    assert statistics["layers.1.linear2"].count == 21


def test_attention_reads_its_projection_past_the_hook():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
            self.head = nn.Linear(128, 64)

        def forward(self, x):
            return self.head(self.attention(x, x, x)[0])

    made = ocsquant.quantize(Net().eval(), RECIPES["channel"], calibration=[torch.randn(4, 9, 128)])
    lines = {line.path: line for line in ocsquant.report(made).layers}
    assert "calibration cannot see its input" in lines["attention.out_proj"].reason
    assert lines["attention.out_proj"].kernel == "quantized_linear"
    assert made(torch.randn(2, 9, 128)).isfinite().all()


def test_calibrated_scales_ride_through_state_dict_and_half():
    made = ocsquant.quantize(network(), RECIPES["tensor"], calibration=batches())
    x = spread_inputs(10, 256, seed=5)
    expected = made(x)
    again = ocsquant.quantize(network(), RECIPES["tensor"], calibration=batches(1))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), expected)
    half = copy.deepcopy(made).half()
    assert half[1].input_inverse.dtype == torch.float32
    assert torch.equal(half[1].input_inverse, made[1].input_inverse)


def test_recipe_round_trip():
    for recipe in RECIPES.values():
        assert Recipe.from_json(recipe.to_json()) == recipe


def split_inputs(**options) -> Activations:
    return Activations(8, max_outliers=0, split=OCS(quantization_aware=False, **options))


@pytest.mark.parametrize("scale", ["tensor", "token"])
def test_a_split_input_is_copies_of_half_the_value(scale):
    """Weights that lie on their grid: the layer with real copies, quantized, gives the same."""
    torch.manual_seed(1)
    x = torch.randn(40, 128)
    x[:, 7] *= 20.0
    layer = nn.Linear(128, 96, bias=False)
    layer.weight.data = torch.randint(-126, 127, (96, 128)).float()
    layer.weight.data[:, 0] = 127.0
    layer.weight.data[:, 7] = torch.randint(-60, 61, (96,)).float()
    recipe = Recipe(activations=dataclasses.replace(split_inputs(expand_ratio=1 / 128), scale=scale))
    made = ocsquant.quantize(copy.deepcopy(layer), recipe, calibration=[x])
    simulated = ocsquant.quantize(copy.deepcopy(layer), recipe, calibration=[x], simulate=True)
    copied = torch.cat([x, x[:, 7:8]], 1)
    copied[:, [7, 128]] /= 2
    step = copied.abs().amax() / 127 if scale == "tensor" else copied.abs().amax(1, keepdim=True) / 127
    expected = (copied / step).round() * step @ torch.cat([layer.weight, layer.weight[:, 7:8]], 1).T
    tolerance = 1e-4 * float(expected.detach().abs().max())
    assert torch.allclose(made(x), expected, atol=tolerance)
    assert torch.allclose(made(x), simulated(x), atol=tolerance)
    # Weights of the split channel that twice would leave the grid go to a tail column.
    layer.weight.data[:, 7] = 100.0
    wide = ocsquant.quantize(copy.deepcopy(layer), recipe, calibration=[x])
    assert wide.tail_index.tolist() == [7]
    assert torch.allclose(wide.weight, layer.weight, rtol=1e-4)


def test_split_channels_are_those_with_outliers():
    torch.manual_seed(1)
    x = torch.randn(400, 128)
    x[:, 3] *= 6.0
    x[::50, 90] *= 40.0  # rarely, but far out
    layer = nn.Linear(128, 96)
    with ocsquant.calibrate(layer) as seen:
        layer(x)
    counts = seen[""].outlier_counts
    assert int(counts.argmax()) == 3
    assert counts.sum() == pytest.approx(0.01 * seen[""].sample.numel(), rel=0.05)
    exact = layer(x).detach()
    errors = {}
    for name, activations in {
        "none": PerTensorStatic(8),
        "counts": dataclasses.replace(split_inputs(expand_ratio=0.01), scale="tensor"),
        "error": dataclasses.replace(split_inputs(expand_ratio=0.05, select="gain"), scale="tensor"),
    }.items():
        made = ocsquant.quantize(copy.deepcopy(layer), Recipe(activations=activations), calibration=seen)
        errors[name] = float((made(x).detach() - exact).norm())
        copies = 1.0 / made.input_inverse if made.input_inverse is not None else torch.ones(128)
        chosen = {int(i) for i in (copies > 1.5 * copies.median()).nonzero()[:, 0]}
        assert chosen == {"none": set(), "counts": {3, 90}, "error": {90}}[name]
    assert errors["error"] < 0.7 * errors["none"]
    assert Recipe.from_json(Recipe(activations=split_inputs(expand_ratio=0.1)).to_json()).activations == split_inputs(
        expand_ratio=0.1
    )


def test_predicted_error_stops_the_splitting():
    """Two channels alike: splitting one of them alone gains nothing."""
    reach = torch.tensor([10.0, 10.0, 1.0, 1.0])
    power = torch.tensor([1.0, 1.0, 50.0, 50.0])
    assert ocs.plan_by_error(reach, power, 1, 8).copies.tolist() == [1, 1, 1, 1]
    assert ocs.plan_by_error(reach, power, 2, 8).copies.tolist() == [2, 2, 1, 1]
    assert ocs.plan_by_error(reach, power, 9, 2).copies.tolist() == [2, 2, 1, 1]
