"""quantize() on every kind of model it may meet."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import ocsquant
from ocsquant.nn import QuantizedLinear, TiedEmbedding


def mlp(**kwargs) -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 64, **kwargs), nn.GELU(), nn.Linear(64, 128, **kwargs))


def reasons(model: nn.Module) -> dict[str, str]:
    return {layer.path: layer.reason for layer in ocsquant.report(model).layers}


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 0.03) -> bool:
    return bool((got - expected).float().norm() <= tolerance * expected.float().norm())


def test_default_is_in_place_and_close():
    model = mlp()
    x = torch.randn(7, 128)
    expected = model(x)
    assert ocsquant.quantize(model) is model
    assert all(isinstance(model[i], QuantizedLinear) for i in (0, 2))
    assert close(model(x), expected, 0.02)


def test_a_root_linear_changes_under_the_callers_reference():
    model = nn.Linear(140, 70)
    x = torch.randn(3, 140)
    expected = model(x)
    alias = model
    ocsquant.quantize(model)
    assert isinstance(alias, QuantizedLinear)
    assert close(alias(x), expected, 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = mlp().to(dtype)
    x = torch.randn(5, 128, dtype=dtype)
    expected = model(x)
    ocsquant.quantize(model)
    y = model(x)
    assert y.dtype == dtype
    assert close(y, expected, 0.03)
    assert model[0].scale.dtype == torch.float32


def test_float64_stays_float_with_a_reason():
    with pytest.raises(ocsquant.NothingToQuantizeError, match="float64"):
        ocsquant.quantize(mlp().double())


def test_conversions_never_touch_scales():
    model = ocsquant.quantize(mlp())
    before = model[0].scale.clone()
    for convert in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16), lambda m: m.float()):
        convert(model)
        assert model[0].scale.dtype == torch.float32
        assert torch.equal(model[0].scale, before)
        assert model[0].packed.dtype == torch.uint8
    model.to("meta")
    assert model[0].scale.is_meta
    assert model[0].packed.is_meta


def test_module_used_twice_is_replaced_in_both_places():
    shared = nn.Linear(128, 128)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ReLU())})
    ocsquant.quantize(model)
    assert isinstance(model["a"], QuantizedLinear)
    assert model["a"] is model["b"][0]


def test_linears_that_share_a_weight_share_its_packed_form():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    model[1].weight = model[0].weight
    ocsquant.quantize(model)
    assert model[0].packed is model[1].packed
    assert not torch.equal(model[0].bias, model[1].bias)


def tied():
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embed": nn.Embedding(100, 128, padding_idx=3), "body": nn.Linear(128, 128), "head": nn.Linear(128, 100)}
    )
    model["head"].weight = model["embed"].weight
    return model


def test_a_head_and_its_embedding_share_one_record(tmp_path):
    model, ids = tied(), torch.tensor([[0, 3, 99], [64, 63, 1]])
    rows = model["embed"](ids)
    ocsquant.quantize(model)
    embed, head = model["embed"], model["head"]
    assert type(embed) is TiedEmbedding
    assert embed.packed is head.packed
    assert torch.equal(embed(ids), head.weight[ids])
    assert torch.equal(embed.weight, head.weight)
    assert (embed(ids) - rows).norm() < 0.01 * rows.norm()
    report = ocsquant.report(model)
    expected = 4 * (100 * 128 + 100 + 128 * 128 + 128)
    assert report.total_before == expected
    assert {row.path: row.kernel for row in report.layers}["embed"] == "rows of the head it is tied to"
    ocsquant.save(model, tmp_path / "file")
    for other in (tied(), copy.deepcopy(model)):
        again = ocsquant.load(other, tmp_path / "file")
        assert torch.equal(again["embed"](ids), embed(ids))
        assert again["embed"].packed is again["head"].packed
    assert model.to(torch.bfloat16)["embed"](ids).dtype == torch.bfloat16
    assert ocsquant.report(model.half()).total_before == expected
    with pytest.raises(ocsquant.ArgumentError, match="input"):
        embed(ids.float())
    for outside in (-1, 100):
        with pytest.raises(IndexError):
            embed(torch.tensor([outside]))


def test_tied_layers_of_different_recipes_are_stored_twice():
    model = tied()
    ocsquant.quantize(model, overrides={"embed": "W4A16", "head": "W8A8"})
    report = {row.path: row for row in ocsquant.report(model).layers}
    assert (report["embed"].scheme, report["head"].scheme) == ("W4A16", "W8A8")
    assert "stored twice" in report["embed"].reason + report["head"].reason


def test_a_tied_weight_of_which_one_layer_stays_float_stays_whole():
    model = tied()
    ocsquant.quantize(model, ignore=["head"])
    assert type(model["embed"]) is nn.Embedding
    assert reasons(model)["embed"] == "its weight is tied to that of Linear, which stays float"
    assert model["head"].weight is model["embed"].weight


@pytest.mark.parametrize("recipe", ["W4A8", "W4A16"])
def test_a_tied_weight_of_fewer_bits_stays_float_unless_named(recipe):
    model, ids = tied(), torch.arange(100)
    ocsquant.quantize(model, recipe)
    assert model["head"].weight is model["embed"].weight
    assert "name both in overrides" in reasons(model)["head"]
    model = tied()
    ocsquant.quantize(model, recipe, overrides={"embed": recipe, "head": recipe})
    assert torch.equal(model["embed"](ids), model["head"].weight)
    if recipe == "W4A16":
        assert model["embed"].packed is model["head"].packed
    else:  # the kernels' layout has no rows of 4 bits to look up
        assert "stored twice" in reasons(model)["embed"]


def test_hooks_move_with_the_layer_and_their_handles_work():
    model, calls = mlp(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_: calls.append("pre"))
    ocsquant.quantize(model)
    model(torch.randn(1, 128))
    assert calls == ["pre", "forward"]
    handle.remove()
    model(torch.randn(1, 128))
    assert calls == ["pre", "forward", "pre"]


def test_parametrized_and_hooked_weights_stay_float_by_name():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    ocsquant.quantize(model)
    assert "remove_parametrizations" in reasons(model)["0"]
    old = mlp()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(old[0])
    ocsquant.quantize(old)
    assert "computed by a hook" in reasons(old)["0"]


def test_a_subclass_with_its_own_forward_stays_float_by_name():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.Sequential(Doubled(128, 128), nn.Linear(128, 128))
    ocsquant.quantize(model)
    assert "forward of its own" in reasons(model)["0"]


def test_what_the_first_call_did_beside_layers_stays_in_the_report():
    conv = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 128))
    encoder = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = nn.Sequential(conv, encoder).eval()
    ocsquant.quantize(model, ignore=["0.3"], fold_batchnorm=True)
    first = reasons(model)
    assert first["0.1"] == "folded into the convolution"
    assert "switched off" in first["1"]
    ocsquant.quantize(model)
    second = reasons(model)
    assert (second["0.1"], second["1"]) == (first["0.1"], first["1"])
    assert second["0.3"] == ""
    assert len(second) == len(ocsquant.report(model).layers)


def test_quantized_twice():
    model = ocsquant.quantize(mlp())
    with pytest.raises(ocsquant.NothingToQuantizeError, match="already quantized"):
        ocsquant.quantize(model)
    bigger = nn.Sequential(model, nn.Linear(128, 64))
    ocsquant.quantize(bigger)
    assert reasons(bigger)["0.0"] == "already quantized"


def test_training_mode_and_frozen_parameters():
    model = mlp().train()
    model[0].eval()
    ocsquant.quantize(model)
    assert [m.training for m in (model[0], model[2])] == [False, True]
    assert list(model.parameters()) == []


def test_gradients_flow_through_to_adapters():
    model = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128))
    float_model = copy.deepcopy(model)
    ocsquant.quantize(model, ignore=["0"])
    float_model[1].weight.data = model[1].weight.clone()
    x, g = torch.randn(4, 128), torch.randn(4, 128)
    model(x).backward(g)
    float_model(x).backward(g)
    torch.testing.assert_close(model[0].weight.grad, float_model[0].weight.grad, rtol=1e-4, atol=1e-5)


def test_small_layers_stay_float_unless_named():
    model = nn.Sequential(nn.Linear(128, 64), nn.Linear(64, 8), nn.Linear(8, 140))
    ocsquant.quantize(model, overrides={"1": "W8A8"})
    assert isinstance(model[1], QuantizedLinear)
    assert "too small" in reasons(model)["2"]


def test_layers_too_small_to_gain_stay_float_with_the_reason():
    model = nn.ModuleDict(
        {
            "c": nn.Conv3d(3, 8, 3),
            "r": nn.LSTM(8, 16),
            "g": nn.GRU(8, 16),
            "e": nn.Embedding(9, 8),
            "l": nn.Linear(128, 128),
        }
    )
    ocsquant.quantize(model)
    for name in "crge":
        assert "too small to gain" in reasons(model)[name]


def test_nothing_to_quantize_says_why():
    with pytest.raises(ocsquant.NothingToQuantizeError, match="too small"):
        ocsquant.quantize(nn.Linear(4, 4))
    with pytest.raises(ocsquant.NothingToQuantizeError, match="no layer with weights"):
        ocsquant.quantize(nn.ReLU())


def test_nan_weights_are_refused_by_name():
    model = mlp()
    model[2].weight.data[1, 3] = torch.nan
    with pytest.raises(ocsquant.NonFiniteError, match=r"2\.weight holds 1 NaN or Inf, the first at flat index 67"):
        ocsquant.quantize(model)
    assert type(model[0]) is nn.Linear


def test_patterns_filters_and_overrides():
    model = nn.Sequential(mlp(), mlp())
    ocsquant.quantize(
        model,
        ignore=["re:0\\.[0-1]"],
        filter_fn=lambda m, path: path != "1.2",
        overrides={"1.*": ocsquant.Recipe(ocsquant.Weights(bits=5))},
    )
    assert reasons(model)["0.0"] == "ignored by pattern"
    assert reasons(model)["1.2"] == "excluded by filter_fn"
    assert model[1][0].bits == 5
    assert model[0][2].bits == 8
    with pytest.raises(ocsquant.ArgumentError, match="ignore must be patterns that match a module"):
        ocsquant.quantize(mlp(), ignore=["head"])


def test_recipe_carries_ignore_and_overrides_and_the_call_wins():
    recipe = ocsquant.Recipe(ignore=("0",), overrides={"2": "W8A16"})
    assert ocsquant.Recipe.from_json(recipe.to_json()) == recipe
    model = mlp()
    ocsquant.quantize(model, recipe, overrides={"2": ocsquant.Recipe(ocsquant.Weights(bits=6))})
    assert model[2].bits == 6
    assert type(model[0]) is nn.Linear
    other = mlp()
    ocsquant.quantize(other, recipe, ignore=[], overrides={})
    assert isinstance(other[0], QuantizedLinear)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("split", [None, ocsquant.OCS(0.05), ocsquant.OCS(max_overhead=0.03)])
def test_every_width_runs_on_the_integer_kernel_and_equals_its_simulation(bits, split):
    model = mlp()
    model[0].weight.data[:, 5] *= 12
    x = torch.randn(20, 128)
    recipe = ocsquant.Recipe(ocsquant.Weights(bits=bits, split=split))
    real = ocsquant.quantize(copy.deepcopy(model), recipe)
    simulated = ocsquant.quantize(copy.deepcopy(model), recipe, simulate=True)
    assert real[0].codes.abs().max() >= 2 ** (bits - 1) - 1
    torch.testing.assert_close(real[0](x), simulated[0](x), rtol=1e-4, atol=1e-4)


def test_max_overhead_is_kept():
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)])
    for layer in model:
        layer.weight.data[:, ::17] *= 6
    for budget in (0.0, 0.01, 0.05):
        q = ocsquant.quantize(
            copy.deepcopy(model), ocsquant.Recipe(ocsquant.Weights(bits=8, split=ocsquant.OCS(max_overhead=budget)))
        )
        added = sum(layer.split_channels * (128 + 4) for layer in q)
        assert added <= budget * 4 * 128 * 128
    assert added > 0


SIMULATED = {
    "conv1d": (lambda: nn.Conv1d(6, 16, 5), (2, 6, 20)),
    "conv2d": (lambda: nn.Conv2d(6, 16, 3, padding=1), (2, 6, 9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 12, 3, groups=3), (2, 6, 9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 9)),
    "lstm": (lambda: nn.LSTM(12, 20, 2, bidirectional=True), (5, 2, 12)),
    "gru": (lambda: nn.GRU(12, 20, batch_first=True), (5, 2, 12)),
    "linear": (lambda: nn.Linear(12, 20), (5, 12)),
}


@pytest.mark.parametrize("name", SIMULATED)
@pytest.mark.parametrize("granularity", ["channel", "tensor", "group"])
def test_simulation_of_every_layer_kind_with_splits(name, granularity):
    make, shape = SIMULATED[name]
    module, x = make(), torch.randn(shape)
    expected = module(x)
    weights = ocsquant.Weights(8, granularity, group_size=8, clip="mse", split=ocsquant.OCS(0.1))
    q = ocsquant.quantize(copy.deepcopy(module), ocsquant.Recipe(weights), simulate=True)
    got = q(x)
    first = lambda t: t[0] if isinstance(t, tuple) else t  # noqa: E731
    assert close(first(got), first(expected))
    assert not torch.equal(first(got), first(expected))
    assert ocsquant.report(q).layers[0].split_channels > 0


def test_embedding_is_simulated_and_its_split_is_named_as_skipped():
    model = nn.Embedding(50, 32)
    ocsquant.quantize(model, ocsquant.Recipe(ocsquant.Weights(split=ocsquant.OCS(0.1))), simulate=True)
    assert "no input channels" in reasons(model)[""]
    assert model(torch.tensor([3])).shape == (1, 32)


def test_batchnorm_folding():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    ocsquant.quantize(model, simulate=True, fold_batchnorm=True)
    assert isinstance(model[1], nn.Identity)
    assert close(model(x), expected)


def test_state_dict_deepcopy_pickle_and_weights_only():
    model, x = ocsquant.quantize(mlp()), torch.randn(3, 128)
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = ocsquant.quantize(mlp())
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)


def test_readable_weight_and_codes():
    model = nn.Linear(140, 70)
    w = model.weight.detach().clone()
    ocsquant.quantize(model, ocsquant.Recipe(ocsquant.Weights(split=ocsquant.OCS(0.1))))
    assert close(model.weight, w, 0.01)
    assert torch.equal(model.weight, model.codes.float() * model.scale[:, None])
    assert "split_channels" in repr(model)


def test_no_global_state_is_changed():
    model = mlp()
    before = (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    random = torch.get_rng_state()
    ocsquant.quantize(model)
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()) == before
    assert torch.equal(torch.get_rng_state(), random)
