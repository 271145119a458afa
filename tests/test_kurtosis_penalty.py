"""The penalty's gradient is that of the explicit loss, however the training loop is built.

A lost, doubled or leaked penalty changes the gradient by a tenth or more; all settings must agree to float rounding.
"""

import copy
import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from penalized import TARGETS, WEIGHT, Net, cross_entropy, data, distance, explicit, gradient, network, silent, step
from torch import nn
from torch.nn import functional as F

from ocsquant import qat


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


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


def _worker(rank: int, path: str, kind: str, compiled: bool, results) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    model = network(kind)
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
    os._exit(0)  # past the end of gloo's threads, which now and then abort the process


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes(tmp_path, compiled, kind):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    workers = [
        context.Process(target=_worker, args=(rank, str(tmp_path / "rendezvous"), kind, compiled, results))
        for rank in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    # Means over equal parts: two processes with two micro-batches each are four micro-batches.
    assert distance(torch.from_numpy(results.get()), explicit(kind, 4)) <= 1e-6
