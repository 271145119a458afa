"""Whatever call fails, quantize() and load() leave the model exactly as it was, and work the next time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from networks import NETWORKS, Network, snapshot
from torch import nn

import ocsquant
from ocsquant import qat

PACKAGE = str(Path(ocsquant.__file__).parent)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Thousands of tiny tensors: on a busy machine two threads waiting for each other take 50 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Injected(Exception):
    """No clause of the package may catch it."""


def interrupt(action: Callable[[], object], n: int, error: type[BaseException]) -> tuple[str | None, bool]:
    """Run `action`, raising at its n-th call of a function of the package: (that function, whether it came through).

    The profiler sees a call before the function's first line, generators at each resumption too. Python closes a
    generator that any() left early while nobody could catch anything: an exception then is dropped and the run goes on.
    """
    calls, reached, dropped = 0, None, []

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal calls, reached
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            calls += 1
            if calls == n:
                reached = f"{frame.f_code.co_name}, line {frame.f_lineno} of {Path(frame.f_code.co_filename).name}"
                raise error(reached)

    profiler, hook = sys.getprofile(), sys.unraisablehook
    try:
        sys.unraisablehook = lambda lost: dropped.append(lost.exc_type)
        sys.setprofile(profile)
        action()
    except error:
        assert reached is not None, "the package raised by itself"
        return reached, True
    finally:
        sys.setprofile(profiler)
        sys.unraisablehook = hook
    assert reached is None or dropped == [error], f"the package swallowed the exception raised in {reached}"
    return reached, False


def sweep(
    fresh: Callable[[], nn.Module], action: Callable[[nn.Module], object], error: type[BaseException] = Injected
) -> tuple[nn.Module, int]:
    """Interrupt `action` at its first, second, ... call; the last run goes through.

    Returns the model that the last run changed, after the failures on it, and the number of failures.
    """
    model, failures, n = fresh(), 0, 0
    expected = snapshot(model)
    while True:
        n += 1
        reached, raised = interrupt(lambda: action(model), n, error)  # noqa: B023 (called at once)
        if reached is None:
            return model, failures
        if raised:
            found = snapshot(model)
            assert found == expected, f"changed by a failure in {reached} (call {n}): {difference(found, expected)}"
            failures += 1
        else:
            model = fresh()
            expected = snapshot(model)


def difference(found: list[object], expected: list[object]) -> str:
    pairs = zip(found, expected, strict=False)
    return next((f"{a} was {b}" for a, b in pairs if a != b), f"{len(found)} facts were {len(expected)}")


def check_close(network: Network, model: nn.Module, expected: torch.Tensor) -> None:
    error = float((network.output(model) - expected).norm() / expected.norm())
    assert 0 < error < network.tolerance, f"relative error {error:.4f}"


@pytest.mark.parametrize("name", NETWORKS)
def test_quantize_interrupted_at_every_call(name: str) -> None:
    network = NETWORKS[name]
    expected = network.output(network.fresh())
    model, failures = sweep(network.fresh, lambda model: ocsquant.quantize(model, **network.options))
    assert failures > 50
    check_close(network, model, expected)
    assert any(layer.kernel for layer in ocsquant.report(model).layers)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("name", ["tied head", "encoder"])
def test_quantize_interrupted_by_what_is_no_plain_exception(name: str, error: type[BaseException]) -> None:
    network = NETWORKS[name]
    expected = network.output(network.fresh())
    model, _ = sweep(network.fresh, lambda model: ocsquant.quantize(model, **network.options), error)
    check_close(network, model, expected)


def test_quantize_again_interrupted() -> None:
    """A model of which a part is quantized already."""
    network = NETWORKS["mlp"]
    expected = network.output(network.fresh())
    model, _ = sweep(
        lambda: ocsquant.quantize(network.fresh(), **network.options, ignore=["2"]),
        lambda model: ocsquant.quantize(model, **network.options),
    )
    check_close(network, model, expected)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", ["encoder", "tied head", "root linear"])
def test_load_interrupted_at_every_call(name: str, device: str, tmp_path: Path) -> None:
    network = NETWORKS[name]
    quantized = ocsquant.quantize(network.fresh(), **network.options)
    ocsquant.save(quantized, tmp_path / "model")

    def blank() -> nn.Module:
        model = network.fresh()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return model.to(device)

    model, failures = sweep(blank, lambda model: ocsquant.load(model, tmp_path / "model"))
    assert failures > 15
    assert torch.equal(network.output(model), network.output(quantized))


def test_load_over_a_quantized_model_interrupted(tmp_path: Path) -> None:
    network = NETWORKS["mlp"]
    quantized = ocsquant.quantize(network.fresh(), **network.options)
    ocsquant.save(quantized, tmp_path / "model")
    model, _ = sweep(
        lambda: ocsquant.quantize(network.fresh(), **network.options),
        lambda model: ocsquant.load(model, tmp_path / "model"),
    )
    assert torch.equal(network.output(model), network.output(quantized))


def test_the_sweep_sees_a_change() -> None:
    def careless(model: nn.Module) -> None:
        model.trace = 1
        ocsquant.quantize(model)

    with pytest.raises(AssertionError, match="changed by a failure in quantize"):
        sweep(lambda: nn.Linear(128, 64), careless)


def prepare(network: Network) -> Callable[[nn.Module], nn.Module]:
    config = qat.Config(clip_init="percentile", fold="channel", weight_bits=4, split=ocsquant.OCS(0.1))
    batches = [network.inputs()]
    return lambda model: qat.prepare(model, config, calibration=batches)


@pytest.mark.parametrize("name", ["encoder", "tied head", "root linear"])
def test_prepare_and_convert_interrupted_at_every_call(name: str) -> None:
    network = NETWORKS[name]
    action = prepare(network)
    model, failures = sweep(network.fresh, action)
    assert failures > 50
    expected = network.output(model)
    model, failures = sweep(lambda: action(network.fresh()), qat.convert)
    assert failures > 50
    torch.testing.assert_close(network.output(model), expected, rtol=1e-3, atol=1e-3)
