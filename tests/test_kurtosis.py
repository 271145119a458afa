import pytest
import reference
import torch

from ocsquant import ops

OP = torch.ops.ocsquant.kurtosis.default
BACKWARD = torch.ops.ocsquant.kurtosis_backward.default
INJECT = torch.ops.ocsquant.kurtosis_inject.default
SHAPES = [(1, 2), (3, 5), (4, 64), (2, 3, 130), (5, 1000), (0, 4), (7,), (300, 288)]


def rows(shape, dtype=torch.float32):
    return (torch.randn(shape) * torch.rand(shape[-1]) + torch.randn(shape[:-1])[..., None]).to(dtype)


def log():
    return torch.zeros(3, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(shape, dtype):
    y = rows(shape, dtype)
    expected = reference.kurtosis(y.double())
    torch.testing.assert_close(ops.kurtosis(y).double(), expected, rtol=1e-5, atol=1e-6)
    g = torch.randn(shape[:-1])
    dy = g.double()[..., None] * reference.kurtosis_gradient(y.double())
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-4}
    torch.testing.assert_close(BACKWARD(g, y).double(), dy, **tolerance)


def test_the_closed_form_is_the_gradient():
    y = rows((6, 40)).double().requires_grad_()
    reference.kurtosis(y).sum().backward()
    assert (reference.kurtosis_gradient(y.detach()) - y.grad).abs().max() <= 1e-12


def test_autograd_of_the_operator():
    y = rows((6, 40)).requires_grad_()
    ops.kurtosis(y).sum().backward()
    assert torch.equal(y.grad, BACKWARD(torch.ones(6), y.detach()))


def test_known_values_and_special_rows():
    assert ops.kurtosis(torch.tensor([[1.0, -1.0, 1.0, -1.0]])).item() == 1.0
    assert ops.kurtosis(torch.randn(200_000)).item() == pytest.approx(3.0, abs=0.1)
    for scale in (1e-9, 1.0, 1e12, 1e18):
        y = torch.randn(2, 100, generator=torch.Generator().manual_seed(1))
        assert torch.allclose(ops.kurtosis(y * scale), ops.kurtosis(y), rtol=1e-4)
    for flat in (torch.zeros(3, 8), torch.full((3, 8), 0.1), torch.full((3, 8), 1e20), torch.randn(5, 1)):
        assert not ops.kurtosis(flat).any()
        assert not BACKWARD(torch.ones(len(flat)), flat).any()
    for value in (float("nan"), float("inf"), -float("inf"), 3e38):
        y = torch.randn(2, 70)
        y[0, 66] = value
        y[0, 3] = -value
        assert ops.kurtosis(y).isnan().tolist() == [True, False]
        assert BACKWARD(torch.ones(2), y).isnan().all(1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", [0.0, 3.0])
def test_injection_adds_the_gradient_of_the_hinged_mean(dtype, target):
    y, g, seen = torch.randn(50, 96).to(dtype), torch.randn(50, 96).to(dtype), log()
    got = INJECT(g, y, torch.tensor(0.5), 0.3, target, seen)
    leaf = y.double().requires_grad_()
    k = reference.kurtosis(leaf)
    (0.5 * 0.3 * (k - target).clamp(min=0).mean()).backward()
    expected = g.double() + leaf.grad
    assert (got.double() - expected).norm() <= (1e-6 if dtype == torch.float32 else 4e-3) * expected.norm()
    at_rest = k <= target
    assert torch.equal(got[at_rest], g[at_rest])
    assert at_rest.any() == (target > 0)
    assert seen.tolist() == pytest.approx([k.sum().item(), 50, 1], rel=1e-5)
    same = INJECT(g, y, torch.tensor(0.0), 0.3, target, seen)
    assert torch.equal(same, g)
    assert seen.tolist() == pytest.approx([2 * k.sum().item(), 100, 2], rel=1e-5)


def test_injection_of_no_rows_and_of_a_row_with_nan():
    seen = log()
    assert INJECT(torch.zeros(0, 5), torch.zeros(0, 5), torch.tensor(1.0), 1.0, 3.0, seen).shape == (0, 5)
    assert not seen.any()
    y = torch.randn(2, 70)
    y[1, 2] = float("nan")
    got = INJECT(torch.ones(2, 70), y, torch.tensor(1.0), 1.0, 0.0, seen)
    assert got.isnan().all(1).tolist() == [False, True]


def test_the_anchor_does_nothing_outside_of_a_backward_pass():
    anchor = torch.ops.ocsquant.kurtosis_anchor.default
    grad = torch.tensor(2.0)
    assert torch.equal(anchor(grad, 0), grad)
    torch.library.opcheck(anchor, (grad, 1))


WRONG = {
    "grad": [torch.zeros(3, 5), torch.zeros(2, 5, dtype=torch.bfloat16), torch.zeros(2, 5, dtype=torch.float64)],
    "y": [torch.zeros(()), torch.zeros(2, 0), torch.zeros(2, 5, dtype=torch.float16)],
    "scale": [torch.zeros(1), torch.zeros((), dtype=torch.float64)],
    "log": [torch.zeros(3), torch.zeros(4, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)[::2]],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_wrong_arguments_are_named(name, value):
    right = {"grad": torch.zeros(2, 5), "y": torch.zeros(2, 5), "scale": torch.zeros(()), "log": log()}
    with pytest.raises(RuntimeError, match=f"kurtosis_inject: {name} must"):
        INJECT(**{**right, name: value}, weight=1.0, target=0.0)
    with pytest.raises(RuntimeError, match="kurtosis_backward: grad must"):
        BACKWARD(torch.zeros(3), torch.zeros(2, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    y = rows((4, 9), dtype)
    torch.library.opcheck(OP, (y.clone().requires_grad_(),))
    torch.library.opcheck(BACKWARD, (torch.ones(4), y))
    torch.library.opcheck(INJECT, (y, y, torch.tensor(1.0), 0.1, 3.0, log()))
