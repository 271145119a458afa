"""prepare and convert: what becomes of a model, before and after training."""

import copy
import pickle
import warnings

import pytest
import torch
from networks import snapshot
from torch import nn

import ocsquant
from ocsquant import OCS, Weights, qat
from ocsquant.qat import Config, QATLinear


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40), nn.SiLU(), nn.Linear(40, 16, bias=False))


def batches(count=2):
    return [torch.randn(12, 24, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def train(model, steps=20, penalty=True):
    x, y = torch.randn(64, 24), torch.randn(64, 16)
    optimizer = torch.optim.AdamW(qat.param_groups(model, 1e-2, 0.1))
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        (qat.with_kurtosis(model, loss) if penalty else loss).backward()
        optimizer.step()
    return float(loss.detach())


def test_prepare_keeps_parameters_names_and_references():
    model = network()
    first, weight, names = model[0], model[0].weight, set(model.state_dict())
    assert qat.prepare(model, Config(clip_init=2.5)) is model
    assert model[0] is first
    assert isinstance(first, QATLinear)
    assert isinstance(first, nn.Linear)
    assert first.weight is weight
    assert set(model.state_dict()) == names | {f"{i}.clip_{c}" for i in (0, 2) for c in ("neg", "pos")}
    assert [c.item() for c in (first.clip_neg, first.clip_pos)] == [-2.5, 2.5]
    assert not any(m._forward_pre_hooks for m in model)
    with pytest.raises(ocsquant.NothingToQuantizeError, match=r"qat\.convert"):
        ocsquant.quantize(model)


def test_the_input_is_rounded_and_the_output_is_not_touched():
    model = qat.prepare(network(), Config(clip_init=1.5))
    x = torch.randn(5, 24)
    layer = model[0]
    rounded = ocsquant.ops.fake_quantize_clip(x, layer.clip_neg, layer.clip_pos, 4)
    assert torch.equal(layer(x), nn.functional.linear(rounded, layer.weight, layer.bias))
    assert len(rounded.unique()) <= 16


@pytest.mark.parametrize("how", ["mse", "percentile", "max"])
def test_clips_from_calibration(how):
    model = qat.prepare(network(), Config(clip_init=how), calibration=batches())
    x = torch.cat(batches())
    low, high = (c.item() for c in (model[0].clip_neg, model[0].clip_pos))
    if how == "max":
        assert (low, high) == (x.min().item(), x.max().item())
    else:
        assert x.min() <= low < -1
        assert 1 < high <= x.max()
    assert model[2].clip_neg > -0.5  # SiLU's range is one-sided


def test_skip_and_kurtosis_on():
    model = qat.prepare(network(), Config(clip_init=2.0, skip=("2",), kurtosis_on=("0",)))
    assert type(model[2]) is nn.Linear
    model = qat.prepare(network(), Config(clip_init=2.0, kurtosis_on=("2",)))
    assert model[0].penalty is None
    assert model[2].penalty is not None


def test_nothing_is_left_half_done():
    model = network()
    model[2].weight.data[0, 0] = float("inf")
    before = snapshot(model)
    with pytest.raises(ocsquant.NonFiniteError, match=r"2\.weight"):
        qat.prepare(model, Config(clip_init=2.0))
    with pytest.raises(ocsquant.NotCalibratedError, match="'0'"):
        qat.prepare(model, Config())
    assert snapshot(model) == before
    model = qat.prepare(network(), Config(clip_init=2.0))
    before = snapshot(model)
    with pytest.raises(ocsquant.NotCalibratedError):
        qat.convert(model, Weights(rounding="gptq"))
    assert snapshot(model) == before
    model[2].clip_pos.data.fill_(float("nan"))
    before = snapshot(model)
    with pytest.raises(ocsquant.NonFiniteError, match=r"2\.clip_pos"):
        qat.convert(model)
    assert snapshot(model) == before


def test_folding_changes_no_output_and_finds_the_outliers():
    model = network()
    data = [b * torch.tensor([16.0 if i == 3 else 1.0 for i in range(24)]) for b in batches()]
    expected = model[0](data[0])
    qat.prepare(model, Config(fold="channel", activation_bits=8), calibration=data)
    layer = model[0]
    assert torch.equal((1 / layer.input_inverse).log2() % 1, torch.zeros(24))
    assert 1 / layer.input_inverse[3] == 16
    folded = nn.functional.linear(data[0] * layer.input_inverse, layer.weight, layer.bias)
    assert torch.equal(folded, expected)
    assert (layer(data[0]) - expected).norm() < 0.02 * expected.norm()


def test_param_groups():
    model = qat.prepare(network(), Config(clip_init=2.0))
    rest, clips = qat.param_groups(model, 1e-3, 0.1, (0.8, 0.9))
    assert clips["betas"] == (0.0, 0.9)
    assert clips["weight_decay"] == 0.0
    assert len(clips["params"]) == 4
    assert len(rest["params"]) == 3
    model[0].clip_neg.requires_grad_(False)
    assert len(qat.param_groups(model, 1e-3, 0.1)[1]["params"]) == 3


def test_dtype_conversions_leave_the_clips_alone():
    model = qat.prepare(network(), Config(clip_init=2.57))
    model.bfloat16()
    assert model[0].weight.dtype == torch.bfloat16
    assert model[0].clip_neg.dtype == torch.float32
    assert model[0].clip_neg.item() == pytest.approx(-2.57, rel=1e-7)
    assert model[0].log.dtype == torch.float64
    qat.with_kurtosis(model, model(torch.randn(4, 24).bfloat16()).square().mean()).backward()
    assert model[0].clip_neg.grad.dtype == torch.float32


def test_state_dict_restarts_training(tmp_path):
    config = Config(clip_init=2.0)
    model = qat.prepare(network(), config)
    train(model)
    torch.save(model.state_dict(), tmp_path / "state")
    again = qat.prepare(network(), config)
    again.load_state_dict(torch.load(tmp_path / "state"))
    x = torch.randn(3, 24)
    assert torch.equal(again(x), model(x))
    whole = pickle.loads(pickle.dumps(model))
    assert torch.equal(whole(x), model(x))
    assert whole[0].penalty is whole[2].penalty
    assert whole[0].penalty.handle != model[0].penalty.handle


def test_training_works_and_moves_the_clips():
    model = qat.prepare(network(), Config(clip_init="mse"), calibration=batches())
    before = float(model[0].clip_pos.detach())
    assert train(model, 60) < 0.8
    assert abs(float(model[0].clip_pos.detach()) - before) > 1e-3


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("align_zero", [False, True])
@pytest.mark.parametrize("fold", ["none", "channel"])
def test_the_integer_model_is_the_trained_one(bits, align_zero, fold):
    data = [b * torch.linspace(0.3, 9, 24) for b in batches()]
    model = qat.prepare(network(), Config(activation_bits=bits, align_zero=align_zero, fold=fold), calibration=data)
    train(model)
    model.eval()
    x = torch.cat(data)
    layer = model[0]
    simulated = qat.convert(copy.deepcopy(model), Weights(bits=4), simulate=True)
    integer = qat.convert(model, Weights(bits=4))
    with torch.no_grad():
        assert torch.equal(integer(x), simulated(x))
    # The codes: an identity in place of the weight shows them.
    probe = integer[0]
    assert probe.kernel == "scale_folded_linear"
    ones = ocsquant.ops.pack_weight(torch.eye(24, dtype=torch.int8))
    codes = ocsquant.ops.scale_folded_linear(
        x, ones, torch.ones(24), probe.input_inverse, probe.input_shift, activation_bits=bits, symmetric=False
    )
    assert -(2 ** (bits - 1)) <= codes.min()
    assert codes.max() <= 2 ** (bits - 1) - 1
    assert layer is probe
    low, step = probe.input_shift[0], 1 / probe.input_inverse[0]
    values = (codes + 2 ** (bits - 1)) / probe.input_inverse + probe.input_shift
    transform = simulated[0].transform
    expected = transform.apply(x)
    unfolded = expected if transform.input_inverse is None else expected / transform.input_inverse
    assert (values - unfolded).abs().max() < 1e-3 * float((1 / probe.input_inverse).max()) + 1e-5
    assert step > 0
    assert low.isfinite()


def test_what_is_converted_equals_what_was_trained():
    """Weights trained through their rounding: evaluation is the same before and after `convert`, bit for bit."""
    for split in (None, OCS(0.1)):
        model = qat.prepare(network(), Config(weight_bits=4, split=split), calibration=batches())
        train(model)
        model.eval()
        x = torch.cat(batches())
        with torch.no_grad():
            expected = model(x)
            got = qat.convert(model)(x)
        assert torch.equal(got, expected)
        assert (model[0].split_channels > 0) == (split is not None)
        assert model[0].bits == 4


def test_weights_in_groups_are_trained_and_converted_in_simulation():
    model = qat.prepare(network(), Config(weight_bits=3, weight_group_size=16), calibration=batches())
    x = torch.cat(batches())
    train(model)
    expected = model.eval()(x).detach()
    with pytest.raises(ocsquant.UnsupportedModuleError, match="groups"):
        qat.convert(copy.deepcopy(model))
    torch.testing.assert_close(qat.convert(model, simulate=True)(x), expected, rtol=1e-4, atol=1e-4)


def test_gptq_and_clip_by_output_see_the_rounded_inputs():
    model = qat.prepare(network(), Config(activation_bits=3), calibration=batches())
    train(model)
    model.eval()
    x = torch.cat(batches(8))
    expected = model(x).detach()

    def error(weights):
        changed = qat.convert(copy.deepcopy(model), weights, calibration=batches(8))
        return float((changed(x) - expected).square().mean())

    nearest, gptq = error(Weights(bits=3)), error(Weights(bits=3, rounding="gptq", clip="output"))
    assert gptq < 0.8 * nearest


def test_convert_leaves_a_plain_quantized_model(tmp_path):
    model = qat.prepare(network(), Config(), calibration=batches())
    train(model)
    assert model._forward_hooks
    qat.convert(model)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert not list(model.parameters())
    assert "W8A4" in str(ocsquant.report(model))
    ocsquant.save(model, tmp_path / "file")
    again = ocsquant.load(network(), tmp_path / "file")
    x = torch.randn(5, 24)
    assert torch.equal(again(x), model(x))


def test_an_idle_penalty_is_reported():
    model = qat.prepare(network(), Config(clip_init=2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qat.kurtosis_report(model) == {}
    train(model, 2, penalty=False)
    with pytest.warns(UserWarning, match="with_kurtosis"):
        report = qat.kurtosis_report(model)
    assert set(report) == {"0", "2"}
    assert all(1 < k < 6 for k in report.values())
    with pytest.warns(UserWarning, match="with_kurtosis"):
        qat.convert(copy.deepcopy(model))
    train(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat.kurtosis_report(model)
        assert qat.kurtosis_report(model) == {}
        qat.convert(model)


def test_the_idle_warning_knows_the_explicit_loss_and_a_schedule():
    model = qat.prepare(network(), Config(clip_init=2.0))
    (model(torch.randn(4, 24)).square().mean() + qat.kurtosis_loss(model)).backward()
    other = qat.prepare(network(), Config(clip_init=2.0))
    qat.set_kurtosis_weight(other, 0.0)
    train(other, 1)
    qat.set_kurtosis_weight(other, 1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qat.kurtosis_report(model)
        qat.kurtosis_report(other)


def test_weights_that_are_shared_are_not_folded():
    """Neither by two layers that are prepared nor with one that is left."""
    for skip in (("2",), ("lm_head",)):
        model = nn.Sequential(nn.Linear(24, 24, bias=False), nn.SiLU(), nn.Linear(24, 24, bias=False))
        model[2].weight = model[0].weight
        weight = model[0].weight.detach().clone()
        data = [b * torch.linspace(0.1, 20, 24) for b in batches()]
        qat.prepare(model, Config(fold="channel", skip=skip), calibration=data)
        assert model[0].input_inverse is None
        assert torch.equal(model[0].weight, weight)
        assert model[0].weight is model[2].weight


def test_what_a_layer_carries_stays_with_it():
    model = network()
    model[0].rate = 2.0
    seen = []
    model[0].register_forward_hook(lambda *a: seen.append(1))
    qat.prepare(model, Config(clip_init=2.0))
    model(torch.randn(3, 24))
    assert model[0].rate == 2.0
    assert seen


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_widened(dtype):
    model = qat.prepare(network(), Config(clip_init=2.0, weight_bits=4)).to(dtype)
    y = model(torch.randn(4, 24, dtype=dtype))
    assert y.dtype == dtype
    qat.with_kurtosis(model, y.square().mean()).backward()
    assert model[0].weight.grad.dtype == dtype
    assert model[0].weight.grad.isfinite().all()


def test_a_fold_that_would_overflow_is_refused():
    model = nn.Sequential(nn.Linear(24, 24)).half()
    model[0].weight.data[:, 3] = 100.0
    data = [torch.randn(9, 24).mul(torch.tensor([5000.0 if i == 3 else 1.0 for i in range(24)])).half()]
    with pytest.raises(ocsquant.NonFiniteError, match=r"0\.weight, folded"):
        qat.prepare(model, Config(fold="channel"), calibration=data)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_matter(default):
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(default)
        model = qat.prepare(network().float(), Config(), calibration=[b.float() for b in batches()])
        y = qat.convert(model)(torch.randn(3, 24, dtype=torch.float32))
        assert y.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_weights_alone():
    for config in (Config(activation_bits=None, weight_bits=4), Config(None, 3, weight_group_size=8)):
        model = qat.prepare(network(), config)
        train(model)
        x = torch.randn(5, 24)
        expected = model.eval()(x).detach()
        torch.testing.assert_close(qat.convert(model)(x), expected, rtol=1e-5, atol=1e-5)
        assert isinstance(model[0], ocsquant.nn.WeightOnly)


def test_the_report_lists_what_was_prepared_and_what_not():
    class Own(nn.Linear):
        pass

    model = network()
    model.append(Own(16, 16))
    qat.prepare(model, Config(clip_init=2.0))
    text = str(ocsquant.report(model))
    assert "rounded in training" in text
    assert "Own is a subclass" in text
    assert "overrides" not in text
    qat.convert(model)
    assert "Own is a subclass" in str(ocsquant.report(model))


def test_attention_and_encoder_layers():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 48, batch_first=True), 2)
    x = torch.randn(2, 6, 32)
    before = snapshot(model)
    with pytest.raises(ocsquant.NonFiniteError):
        qat.prepare(model, calibration=[torch.full((2, 6, 32), torch.nan)])
    assert snapshot(model) == before
    qat.prepare(model, calibration=[x])
    assert isinstance(model.layers[0].self_attn.out_proj, QATLinear)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        got = qat.convert(copy.deepcopy(model), simulate=True)(x)
        integer = qat.convert(model, Weights(rounding="gptq"), calibration=[x])(x)
    assert (got - expected).norm() < 0.05 * expected.norm()
    assert (integer - expected).norm() < 0.05 * expected.norm()


def test_static_asymmetric_inputs_without_training():
    model = network()
    x = torch.cat(batches()).abs()
    recipe = ocsquant.Recipe(Weights(), ocsquant.PerTensorStatic(symmetric=False))
    expected = model(x).detach()
    errors = []
    for activations in (recipe.activations, ocsquant.PerTensorStatic()):
        changed = ocsquant.quantize(
            copy.deepcopy(model),
            ocsquant.Recipe(Weights(), activations, {"*": ocsquant.Recipe(Weights(), activations)}),
            calibration=[x],
        )
        errors.append(float((changed(x) - expected).square().mean()))
    assert errors[0] < errors[1]
