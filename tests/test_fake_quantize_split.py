import pytest
import reference
import torch

from ocsquant import ops

SHAPES = [(1, 1), (3, 5), (4, 64), (7, 130), (5, 6, 3), (4, 3, 3, 3), (0, 4), (2, 0)]


def case(shape, bits, per_row, dtype=torch.float32):
    x = torch.randn(shape).to(dtype)
    splits = torch.randint(1, 4, (shape[1],), dtype=torch.int32)
    scale = torch.rand(shape[0]) * 2.0 / 2**bits + 0.01 if per_row else torch.tensor(0.5 / 2 ** (bits - 2))
    return x, scale, splits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward(shape, per_row, dtype):
    for bits in (2, 4, 8):
        x, scale, splits = case(shape, bits, per_row, dtype)
        assert torch.equal(
            ops.fake_quantize_split(x, scale, splits, bits), reference.fake_quantize_split(x, scale, splits, bits)
        )
        g = torch.randn(shape).to(dtype)
        dx, dscale = torch.ops.ocsquant.fake_quantize_split_backward(g, x, scale, splits, bits)
        expected_dx, expected_dscale = reference.fake_quantize_split_backward(g, x, scale, splits, bits)
        assert torch.equal(dx, expected_dx)
        torch.testing.assert_close(dscale, expected_dscale, rtol=1e-5, atol=1e-4)


def test_autograd_reaches_weight_and_scale():
    x, scale, splits = case((6, 40), 4, True)
    x.requires_grad_()
    scale.requires_grad_()
    g = torch.randn(6, 40)
    ops.fake_quantize_split(x, scale, splits, 4).backward(g)
    dx, dscale = reference.fake_quantize_split_backward(g, x.detach(), scale.detach(), splits, 4)
    assert torch.equal(x.grad, dx)
    torch.testing.assert_close(scale.grad, dscale)


def test_gradient_of_the_scale_is_the_derivative_where_it_exists():
    """Outside the range y = +-n Q s, whose derivative by s needs no straight-through assumption."""
    x = torch.tensor([[50.0, -50.0, 3.0]])
    splits = torch.tensor([1, 2, 1], dtype=torch.int32)
    scale = torch.tensor(0.1, requires_grad=True)
    ops.fake_quantize_split(x, scale, splits, 4).sum().backward()
    assert scale.grad.item() == pytest.approx(7.0 - 14.0 + 7.0, abs=1e-4)


def test_special_values():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 0.05, -0.05, 0.15]])
    y = ops.fake_quantize_split(x, torch.tensor(0.1), torch.ones(6, dtype=torch.int32), 4)
    assert y[0, 0].isnan()
    assert y[0, 1:3].tolist() == pytest.approx([0.7, -0.7])
    grad = torch.ones(1, 6)
    dx, _ = torch.ops.ocsquant.fake_quantize_split_backward(
        grad, x, torch.tensor(0.1), torch.ones(6, dtype=torch.int32), 4
    )
    assert dx.tolist() == [[1.0, 0.0, 0.0, 1.0, 1.0, 1.0]]


def test_split_widens_the_range_by_whole_codes():
    """A channel split n times equals n copies within +-Q whose codes add up (quantization-aware OCS)."""
    x = torch.linspace(-3, 3, 61)[None].repeat(2, 1)
    splits = torch.full((61,), 3, dtype=torch.int32)
    y = ops.fake_quantize_split(x, torch.tensor(0.2), splits, 3)
    codes = (y / 0.2).round()
    assert codes.abs().max() == 9
    copies = [torch.floor((codes + i) / 3) for i in range(3)]  # Hermite's identity
    assert torch.equal(sum(copies), codes)
    assert max(c.abs().max() for c in copies) <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    x, scale, splits = case((4, 9), 4, True, dtype)
    op = torch.ops.ocsquant.fake_quantize_split.default
    torch.library.opcheck(op, (x.clone().requires_grad_(), scale.clone().requires_grad_(), splits, 4))
    torch.library.opcheck(op, (x, torch.tensor(0.1), splits, 4))
    torch.library.opcheck(torch.ops.ocsquant.fake_quantize_split_backward.default, (x, x, scale, splits, 4))
