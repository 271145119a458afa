"""`kurtosis_loss`, models whose output has a loss, and what a step leaves behind."""

import copy
import gc
import weakref
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from penalized import TARGETS, WEIGHT, Net, cross_entropy, data, distance, explicit, gradient, network, silent, step
from torch import nn

import ocsquant
from ocsquant import qat


@pytest.mark.parametrize("kind", TARGETS)
def test_kurtosis_loss_is_the_same_penalty(kind):
    model = network(kind)
    x, y = data()
    for _ in range(2):
        model.zero_grad()
        loss = cross_entropy(model(x), y)
        (loss + qat.kurtosis_loss(model)).backward()
        assert distance(gradient(model), explicit(kind)) <= 1e-6
        assert not model.blocks[0].up.penalty.outputs  # dropped in backward
        with pytest.raises(ocsquant.PenaltyError, match="with_kurtosis"):
            qat.kurtosis_loss(model)
    x, y = data()
    model.zero_grad()
    for a, b in zip(x.chunk(4), y.chunk(4), strict=True):
        ((cross_entropy(model(a), b) + qat.kurtosis_loss(model)) / 4).backward()
    assert distance(gradient(model), explicit(kind, 4)) <= 1e-6


def test_a_part_of_the_outputs_is_not_taken_for_the_whole():
    model = network("plain")
    model.blocks[0].reentrant = False
    x, y = data()
    loss = cross_entropy(model(x), y)
    with pytest.raises(ocsquant.PenaltyError, match=r"blocks\.0\.up"):
        qat.kurtosis_loss(model)
    qat.with_kurtosis(model, loss).backward()
    assert distance(gradient(model), explicit("plain")) <= 1e-6


def test_a_layer_that_no_token_reached_adds_nothing():
    model = qat.prepare(nn.Linear(8, 8), qat.Config(clip_init=2.0, kurtosis_target=0.0))
    full, empty = torch.randn(4, 8), torch.randn(0, 8)
    model(full)
    alone = qat.kurtosis_loss(model)
    model(full)
    kept = next(iter(model.penalty.outputs.values()))
    kept.append(nn.functional.linear(empty, model.weight))
    assert torch.equal(qat.kurtosis_loss(model), alone)
    model(empty)
    assert qat.kurtosis_loss(model) == 0


def test_an_interrupted_backward_leaves_nothing():
    model = network("plain")
    x, y = data()

    def fail(grad):
        raise KeyboardInterrupt

    loss = qat.with_kurtosis(model, cross_entropy(model(x), y))
    handle = model.blocks[0].down.weight.register_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    handle.remove()
    assert not silent(model)
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    got = gradient(model)
    qat.set_kurtosis_weight(model, 0.0)
    model.zero_grad()
    assert distance(step(model), got) <= 1e-6


def test_a_forward_without_backward_does_not_keep_the_model():
    model = network("plain")
    x, _ = data()
    model(x)
    weight = weakref.ref(model.blocks[0].up.weight)
    del model
    gc.collect()
    assert weight() is None


def test_a_second_derivative_is_refused():
    model = network("plain")
    x, y = data()
    loss = qat.with_kurtosis(model, cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, list(model.parameters()), create_graph=True)


def test_both_ways_in_one_step_are_refused():
    model = network("plain")
    x, y = data()
    loss = cross_entropy(model(x), y)
    qat.kurtosis_loss(model)
    with pytest.raises(ocsquant.PenaltyError, match="twice"):
        qat.with_kurtosis(model, loss)
    qat.with_kurtosis(model, cross_entropy(model(x), y))
    with pytest.raises(ocsquant.PenaltyError, match="twice"):
        qat.kurtosis_loss(model)
    (cross_entropy(model(x), y) + qat.kurtosis_loss(model)).backward()  # a new forward begins anew


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_explicit_loss_names_the_other_where_outputs_are_recomputed(reentrant):
    model = network("plain", reentrant)
    x, _ = data()
    model(x.requires_grad_())
    with pytest.raises(ocsquant.PenaltyError, match="with_kurtosis"):
        qat.kurtosis_loss(model)


def test_nested_anchors_and_unrelated_terms():
    model = network("plain")
    x, y = data()
    loss = qat.with_kurtosis(model, qat.with_kurtosis(model, cross_entropy(model(x), y)))
    (loss + sum(p.square().sum() for p in model.parameters()) * 0.0).backward()
    assert distance(gradient(model), explicit("plain")) <= 1e-6
    assert silent(model)


def test_an_output_changed_in_place_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    qat.prepare(model, qat.Config(clip_init=2.0))
    with pytest.raises(RuntimeError, match="inplace"):
        model(torch.randn(3, 8)).sum().backward()
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True))
    qat.prepare(model, qat.Config(clip_init=2.0, kurtosis_weight=0.0))(torch.randn(3, 8)).sum().backward()


def test_copies_and_evaluation():
    model = network("plain")
    x, y = data()
    model(x)
    again = copy.deepcopy(model)
    assert not again.blocks[0].up.penalty.outputs
    assert again.blocks[0].up.penalty is again.blocks[1].down.penalty
    assert not any("log" in key or "scale" in key for key in model.state_dict())
    assert distance(step(again), explicit("plain")) <= 1e-6
    assert silent(model)
    assert not any(p.grad is not None for p in model.parameters())
    model.eval()
    qat.with_kurtosis(model, cross_entropy(model(x), y)).backward()
    assert all(m.log[2] == 0 for m in model.modules() if isinstance(m, qat.QATLinear))
    with torch.no_grad():
        assert not qat.with_kurtosis(model, cross_entropy(model(x), y)).requires_grad


Named = namedtuple("Named", ["loss", "logits"])


@dataclass(frozen=True)
class Frozen:
    loss: torch.Tensor


@dataclass
class Plain:
    loss: torch.Tensor


OUTPUTS = {
    "object": Plain,
    "frozen": Frozen,
    "named tuple": lambda loss: Named(loss, None),
    "mapping": lambda loss: {"loss": loss},
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_an_output_with_a_loss_is_anchored_by_itself(kind):
    class WithLoss(Net):
        def forward(self, x, y):
            return OUTPUTS[kind](cross_entropy(super().forward(x), y))

    torch.manual_seed(0)
    config = qat.Config(clip_init=2.5, kurtosis_weight=WEIGHT, kurtosis_target=0.0, skip=("head",))
    model = qat.prepare(WithLoss(), config)
    output = model(*data())
    loss = output["loss"] if kind == "mapping" else output.loss
    loss.backward()
    assert distance(gradient(model), explicit("plain")) <= 1e-6
    qat.convert(nn.ModuleDict({"inside": model}))
    model(*data())  # no hook is left that would look for the penalty
