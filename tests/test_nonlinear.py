"""`ops.nonlinear` and the same functions in the epilogue of the linear operators."""

import pytest
import reference
import torch

from ocsquant import ops

KINDS = ["none", *reference.NONLINEARITIES]


def values():
    return torch.cat([torch.linspace(-12, 12, 9001), torch.randn(500) * 1e-3, torch.tensor([0.0, 1e4, -1e4, 80, -80])])


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind):
    x = values()
    expected = reference.nonlinear(x, kind)
    error = (ops.nonlinear(x, kind).double() - expected).abs()
    assert (error <= 4e-7 * torch.maximum(expected.abs(), x.abs().clamp(max=20)) + 1e-7).all()
    narrow = ops.nonlinear(x.bfloat16(), kind)
    torch.testing.assert_close(narrow.double(), reference.nonlinear(x.bfloat16(), kind), rtol=2**-8, atol=1e-6)
    assert ops.nonlinear(torch.tensor([torch.nan, 1.0]), kind).isnan().tolist() == [True, False]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (5, 1000), (2048,), (40_001,)])
def test_shapes_threads_and_views(shape):
    x = torch.randn(shape)
    y = ops.nonlinear(x, "gelu")
    assert y.shape == x.shape
    torch.testing.assert_close(y, torch.nn.functional.gelu(x), rtol=1e-5, atol=3e-6)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(ops.nonlinear(x, "gelu"), y)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ops.nonlinear(x.T if x.dim() == 2 else x, "gelu"), y.T if x.dim() == 2 else y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("n", [70, 128])
def test_the_epilogue_has_the_same_bits(kind, bits, group_size, n):
    x = torch.randn(9, 96)
    codes = torch.randint(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1), (n, 96), dtype=torch.int8)
    packed = ops.pack_weight(codes, None, bits, None, None, group_size)
    scale = torch.rand((3, n) if group_size else n) / 20
    form = {"bias": torch.randn(n), "group_size": group_size, "weight_bits": bits}
    for rows in (x, x[:1], x.bfloat16()):
        y = ops.quantized_linear(rows.float(), packed, scale, **form)
        expected = ops.nonlinear(y, kind).to(rows.dtype)
        got = ops.quantized_linear(rows, packed, scale, **form, nonlinearity=kind)
        assert torch.equal(got, expected)
    if group_size == 0:
        del form["group_size"]
        folded = ops.scale_folded_linear(x, packed, scale, torch.full((96,), 30.0), **form)
        got = ops.scale_folded_linear(x, packed, scale, torch.full((96,), 30.0), **form, nonlinearity=kind)
        assert torch.equal(got, ops.nonlinear(folded, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_pytorch(kind):
    packed, scale = ops.pack_weight(torch.randint(-9, 9, (20, 30), dtype=torch.int8)), torch.rand(20) / 9
    leaves = [torch.randn(4, 30, requires_grad=True) for _ in range(3)]
    for leaf in leaves[1:]:
        leaf.data = leaves[0].data.clone()
    ops.nonlinear(ops.quantized_linear(leaves[0], packed, scale), kind).sum().backward()
    ops.quantized_linear(leaves[1], packed, scale, nonlinearity=kind).sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    inverse = torch.full((30,), 20.0)
    y = ops.scale_folded_linear(leaves[2], packed, scale, inverse, nonlinearity=kind)
    y.sum().backward()
    plain = ops.scale_folded_linear(leaves[2].detach(), packed, scale, inverse)
    torch.testing.assert_close(y.detach(), reference.nonlinear(plain, kind).float())
    assert leaves[2].grad.isfinite().all()


def test_opcheck():
    op = torch.ops.ocsquant
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(op.nonlinear.default, (torch.randn(3, 70, dtype=dtype), "silu"))
        x, codes = torch.randn(2, 30, dtype=dtype), torch.randint(-9, 9, (20, 30), dtype=torch.int8)
        arguments = (x, ops.pack_weight(codes), torch.rand(20), None, None, 8, 16, 4.0, 0, 8, None, None, "gelu")
        torch.library.opcheck(op.quantized_linear_nonlinear.default, arguments)
