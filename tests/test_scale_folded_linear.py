import pytest
import reference
import torch
from test_quantized_linear import layer, tokens

from ocsquant import ops
from ocsquant.methods.outliertune import InputTransform, transformed_codes


def fold(k: int, size: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """inverse and shift: codes of a Gaussian input fill the 8 bits, a few go beyond."""
    g = torch.Generator().manual_seed(3)
    return (torch.rand(k, generator=g) + 0.5) * 127 / size, torch.randn(k, generator=g) * 0.2


@pytest.mark.parametrize(("m", "n", "k"), [(1, 16, 16), (5, 130, 64), (13, 70, 300), (97, 66, 130)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("max_outliers", [0, 4, 64])
def test_equals_reference_bit_for_bit(m, n, k, dtype, dynamic, max_outliers):
    codes, _, _, scale, bias = layer(n, k)
    inverse, shift = fold(k)
    x = tokens(m, k, outliers=2, size=8.0).to(dtype)
    y = ops.scale_folded_linear(x, ops.pack_weight(codes), scale, inverse, shift, bias, None, 8, dynamic, max_outliers)
    expected = reference.scale_folded_linear(x, codes, scale, inverse, shift, bias, 8, dynamic, max_outliers)
    assert y.dtype == dtype
    assert torch.equal(y, expected)


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_the_simulated_codes_are_the_kernels(bits):
    codes, _, _, scale, _ = layer(70, 200)
    inverse, shift = fold(200)
    x = tokens(9, 200, outliers=5, size=9.0)
    for dynamic in (False, True):
        transform = InputTransform(inverse * 2.0 ** (bits - 8), shift, dynamic)
        q, step = transformed_codes(x, transform, bits, 4, 4.0)
        y = ops.scale_folded_linear(
            x, ops.pack_weight(codes), scale, transform.inverse, shift, None, None, bits, dynamic, 4
        )
        assert torch.equal(y, (q.long() @ codes.long().T).float() * (step[:, None] * scale))


def test_values_beyond_the_range_are_split_while_they_are_few():
    codes = torch.ones(1, 64, dtype=torch.int8)
    packed, one = ops.pack_weight(codes), torch.ones(64)
    x = torch.zeros(3, 64)
    x[0, 0], x[1, :2], x[2, 0] = 1000.0, 1000.0, 1e9
    y = ops.scale_folded_linear(x, packed, torch.ones(1), one, max_outliers=1)
    assert y.flatten().tolist() == [1000.0, 254.0, 32512.0]
    assert ops.scale_folded_linear(x[:1], packed, torch.ones(1), one).item() == 127.0


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32512.4, 32513.0, 32767.4, 32767.6, 32768.0, 40000.0, 2.0**31, 2.0**33, 3e38])
def test_values_no_code_has_room_for_are_clamped(size, symmetric):
    codes = torch.tensor([[1, 3]], dtype=torch.int8)
    x = torch.tensor([[size, 1.0], [-size, 1.0]])
    for max_outliers in (0, 1) if symmetric else (0,):
        form = {"symmetric": symmetric, "max_outliers": max_outliers}
        y = ops.scale_folded_linear(x, ops.pack_weight(codes), torch.ones(1), torch.ones(2), **form)
        top = 32512.0 if max_outliers else 127.0
        expected = [top + 3.0, -top + 3.0] if symmetric else [127.0 - 127.0 * 3, -128.0 - 127.0 * 3]
        assert y.flatten().tolist() == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_gives_nan_and_spares_the_others(bad):
    codes, _, _, scale, bias = layer(70, 100)
    inverse, shift = fold(100)
    x = tokens(5, 100)
    clean = ops.scale_folded_linear(x, ops.pack_weight(codes), scale, inverse, shift, bias)
    x[2, 50] = bad
    y = ops.scale_folded_linear(x, ops.pack_weight(codes), scale, inverse, shift, bias)
    assert y[2].isnan().all()
    keep = torch.arange(5) != 2
    assert torch.equal(y[keep], clean[keep])


def test_tail_columns_count_twice_what_their_channel_holds():
    codes, tail, index, scale, bias = layer(33, 90, 7)
    inverse, shift = fold(90)
    x = tokens(11, 90)
    whole = codes.to(torch.int16).index_add(1, index.long(), tail.to(torch.int16))
    y = ops.scale_folded_linear(x, ops.pack_weight(codes, tail), scale, inverse, shift, bias, index, max_outliers=3)
    q, _ = transformed_codes(x, InputTransform(inverse, shift, dynamic=False), 8, 3, 4.0)
    assert torch.equal(y, (q.long() @ whole.long().T).float() * scale + bias)


def test_gradient_is_that_of_the_dequantized_weight():
    codes, tail, index, scale, bias = layer(30, 50, 4)
    inverse, shift = fold(50)
    packed = ops.pack_weight(codes, tail)
    x = torch.randn(6, 50, requires_grad=True)
    y = ops.scale_folded_linear(x, packed, scale, inverse, shift, bias, index)
    g = torch.randn_like(y)
    y.backward(g)
    weight = ops.dequantize_packed(packed, scale, 50, index) * inverse
    assert torch.allclose(x.grad, g @ weight, rtol=1e-5, atol=1e-4)


def test_opcheck():
    codes, tail, index, scale, bias = layer(20, 30, 3)
    inverse, shift = fold(30)
    packed = ops.pack_weight(codes, tail)
    operator = torch.ops.ocsquant
    static, folded = operator.scale_folded_linear.default, operator.scale_folded_linear_nonlinear.default
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 4, 30, dtype=dtype)
        args = (packed, scale, inverse, shift, bias, index, 8, False, 2, 4.0)
        torch.library.opcheck(static, (x, *args[:-3], 2, True))
        torch.library.opcheck(folded, (x, *args, True, 8, None, None, "relu"))
        trained = operator.scale_folded_linear_train.default
        torch.library.opcheck(trained, (x.requires_grad_(), *args))
    torch.library.opcheck(static, (torch.randn(30), ops.pack_weight(codes), scale, inverse))
