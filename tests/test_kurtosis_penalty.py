"""The penalty's gradient is that of the explicit loss, however the training loop is built.

A lost, doubled or leaked penalty changes the gradient by a tenth or more; all settings must agree to float rounding.
"""

import copy
import gc
import os
import weakref
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import ocsquant
from ocsquant import qat

WEIGHT = 0.3
TARGETS = {"plain": 0.0, "hinge": 3.0}


class Block(nn.Module):
    def __init__(self, reentrant: bool | None):
        super().__init__()
        self.up, self.down, self.reentrant = nn.Linear(24, 40), nn.Linear(40, 24), reentrant

    def inner(self, x):
        return x + self.down(F.silu(self.up(x)))

    def forward(self, x):
        return self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Net(nn.Module):
    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block(reentrant) for _ in range(3)), nn.Linear(24, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def network(kind: str, reentrant: bool | None = None) -> Net:
    torch.manual_seed(0)
    model = Net(reentrant)
    config = qat.Config(clip_init=2.5, kurtosis_weight=WEIGHT, kurtosis_target=TARGETS[kind], skip=("head",))
    return qat.prepare(model, config)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(16, 7, 24, generator=g)
    return x * (1 + 4 * (torch.rand(24, generator=g) > 0.8)), torch.randint(0, 5, (16, 7), generator=g)


def cross_entropy(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), y.flatten())


def gradient(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def explicit(kind: str, parts: int = 1, factor: float = 1.0) -> torch.Tensor:
    """The gradient with the penalty written into the loss, layer by layer, without anything of ocsquant.qat's."""
    model = network(kind)
    for p in [m.penalty for m in model.modules() if isinstance(m, qat.QATLinear)]:
        p.weight = 0.0
    outputs = []
    for layer in model.modules():
        if isinstance(layer, qat.QATLinear):
            layer.register_forward_hook(lambda module, args, y: outputs.append(y))
    x, y = data()
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        outputs.clear()
        loss = cross_entropy(model(a), b)
        for out in outputs:
            k = ocsquant.ops.kurtosis(out)
            loss = loss + WEIGHT * out.shape[-1] / 64 * (k - TARGETS[kind]).clamp(min=0).mean()
        (loss * (factor / parts)).backward()
    return gradient(model)


def distance(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def step(model: nn.Module, run=None, parts: int = 1, factor: float = 1.0) -> torch.Tensor:
    """The gradient of a step with the anchor."""
    x, y = data()
    x.requires_grad_()  # reentrant checkpointing asks for it
    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
        (qat.with_kurtosis(model, cross_entropy((model if run is None else run)(a), b)) * (factor / parts)).backward()
    return gradient(model)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def silent(model: nn.Module) -> bool:
    """Whether the scale has returned to 0."""
    return all(float(p.scale) == 0.0 for p in qat.losses.penalties_of(model))


@pytest.mark.parametrize("kind", TARGETS)
def test_the_penalty_matters(kind):
    model = network(kind)
    x, y = data()
    cross_entropy(model(x), y).backward()
    assert distance(gradient(model), explicit(kind)) > 0.05


SETTINGS = {
    "eager": {},
    "checkpoint": {"reentrant": False},
    "checkpoint reentrant": {"reentrant": True},
    "accumulation": {"parts": 4},
    "loss scale": {"factor": 1024.0},
    "compile": {"backend": "aot_eager"},
    "compile, checkpoint": {"backend": "aot_eager", "reentrant": False},
    "compile, all together": {"backend": "aot_eager", "reentrant": False, "parts": 4, "factor": 64.0},
    "inductor": {"backend": "inductor", "reentrant": False},
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_gradient_is_that_of_the_explicit_loss(setting, kind):
    options = dict(SETTINGS[setting])
    backend, reentrant = options.pop("backend", None), options.pop("reentrant", None)
    model = network(kind, reentrant)
    run = None if backend is None else torch.compile(model, backend=backend, fullgraph=True)
    for _ in range(2):  # the second step would show what the first one left
        model.zero_grad()
        got = step(model, run, **options)
        assert distance(got, explicit(kind, **options)) <= 1e-6 * (3 if backend == "inductor" else 1)
        assert silent(model)
    rows = {float(m.log[1]) for m in model.modules() if isinstance(m, qat.QATLinear)}
    assert rows == {2 * 16 * 7.0}  # each layer's backward came once for each token of each step
    # Without the anchor, nothing: neither from the step before nor by itself.
    model.zero_grad()
    x, y = data()
    cross_entropy((model if run is None else run)(x.requires_grad_()), y).backward()
    plain = gradient(model)
    qat.set_kurtosis_weight(model, 0.0)
    model.zero_grad()
    assert distance(step(model, run), plain) <= 1e-6


@pytest.mark.parametrize("kind", TARGETS)
def test_the_anchor_inside_a_compiled_region(kind):
    model = network(kind)

    def loss_of(x, y):
        return qat.with_kurtosis(model, cross_entropy(model(x), y))

    for backend in ("aot_eager", "inductor"):
        run = torch.compile(loss_of, backend=backend, fullgraph=True)
        for _ in range(2):
            model.zero_grad()
            run(*data()).backward()
            assert distance(gradient(model), explicit(kind)) <= 3e-6
            assert silent(model)


def test_a_schedule_of_the_weight_compiles_once():
    model, full, plain = network("plain"), explicit("plain"), None
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    gradients = {}
    for share in (0.0, 1.0, 0.5, 2.0):
        qat.set_kurtosis_weight(model, share * WEIGHT)
        model.zero_grad()
        gradients[share] = step(model, run).clone()
    plain = gradients[0.0]
    assert distance(gradients[1.0], full) <= 1e-6
    for share in (0.5, 2.0):
        assert distance(gradients[share], plain + share * (full - plain)) <= 1e-5
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", TARGETS)
def test_autocast_is_as_good_as_the_explicit_loss(kind):
    """Against the float64 gradient, computed by plain torch."""
    exact = copy.deepcopy(network(kind))
    x, y = data()
    reference = exact_gradient(exact, kind, x, y)
    errors = []
    for anchored in (True, False):
        model = network(kind)
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x), y)
            loss = qat.with_kurtosis(model, loss) if anchored else loss + qat.kurtosis_loss(model)
        loss.backward()
        errors.append(distance(gradient(model), reference))
    assert errors[0] <= 1.05 * errors[1]
    assert errors[0] < 0.05


def exact_gradient(model: Net, kind: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """In float64, with a straight-through estimate of the rounding written out."""
    layers = {id(m): m for m in model.modules() if isinstance(m, qat.QATLinear)}
    doubles = {id(p): p.detach().double().requires_grad_() for p in model.parameters()}
    penalty = torch.zeros((), dtype=torch.float64)

    def linear(layer, h):
        nonlocal penalty
        if id(layer) not in layers:
            return F.linear(h, doubles[id(layer.weight)], doubles[id(layer.bias)])
        low, high = doubles[id(layer.clip_neg)], doubles[id(layer.clip_pos)]
        place = (torch.minimum(torch.maximum(h, low), high) - low) * (15 / (high - low))
        h = (place + (place.round() - place).detach()) / (15 / (high - low)) + low
        out = F.linear(h, doubles[id(layer.weight)], doubles[id(layer.bias)])
        z = out - out.mean(-1, keepdim=True)
        k = z.pow(4).mean(-1) / z.square().mean(-1).square()
        penalty = penalty + WEIGHT * out.shape[-1] / 64 * (k - TARGETS[kind]).clamp(min=0).mean()
        return out

    h = x.double()
    for block in model.blocks:
        h = h + linear(block.down, F.silu(linear(block.up, h)))
    (cross_entropy(linear(model.head, h), y) + penalty).backward()
    return torch.cat([doubles[id(p)].grad.flatten() for p in model.parameters()])


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


def _worker(rank: int, path: str, compiled: bool, results) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = network("hinge")
    parallel = nn.parallel.DistributedDataParallel(model)
    run = torch.compile(parallel, backend="aot_eager") if compiled else parallel
    x, y = data()
    x, y = x.chunk(2)[rank], y.chunk(2)[rank]
    with parallel.no_sync():
        (qat.with_kurtosis(parallel, cross_entropy(run(x[:4]), y[:4])) / 2).backward()
    (qat.with_kurtosis(parallel, cross_entropy(run(x[4:]), y[4:])) / 2).backward()
    if rank == 0:
        results.put(gradient(model).numpy())
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes(tmp_path, compiled):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_worker, args=(rank, str(tmp_path / "rendezvous"), compiled, results))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    # Means over equal parts: two processes with two micro-batches each are four micro-batches.
    assert distance(torch.from_numpy(results.get()), explicit("hinge", 4)) <= 1e-6
