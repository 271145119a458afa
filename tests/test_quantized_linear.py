import os
import subprocess
import sys
from pathlib import Path

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ocsquant import ops
from ocsquant.methods.tokens import quantize_tokens


def layer(n: int, k: int, e: int = 0, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """codes, tail, tail_index, scale, bias: full range, extremes included."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
    codes[0] = 127
    tail = torch.randint(-127, 128, (n, e), dtype=torch.int8, generator=g) if e else None
    index = torch.randperm(k, generator=g)[:e].sort().values.to(torch.int32) if e else None
    return codes, tail, index, torch.rand(n, generator=g) + 0.1, torch.randn(n, generator=g)


def tokens(m: int, k: int, outliers: int = 3, size: float = 40.0, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    for row in x:
        row[torch.randperm(k, generator=g)[:outliers]] *= size
    return x


# One output or column; no multiple of panel, group, 64 lanes or row tile; more rows than a row block.
SHAPES = [(1, 1, 1), (1, 16, 16), (2, 65, 63), (5, 64, 64), (6, 3, 257), (7, 130, 33), (13, 70, 300), (97, 66, 130)]


@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference_bit_for_bit(m, n, k, dtype):
    e = min(k, 5)
    codes, tail, index, scale, bias = layer(n, k, e)
    x = tokens(m, k).to(dtype)
    y = ops.quantized_linear(x, ops.pack_weight(codes, tail), scale, bias, index)
    assert y.dtype == dtype
    assert torch.equal(y, reference.quantized_linear(x, codes, scale, bias, tail, index))


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("max_outliers", [0, 1, 16, 64])
def test_every_token_quantizer(bits, max_outliers):
    codes, _, _, scale, _ = layer(20, 200)
    x = tokens(9, 200, outliers=20, size=15.0)
    y = ops.quantized_linear(x, ops.pack_weight(codes), scale, None, None, bits, max_outliers, 3.0)
    expected = reference.quantized_linear(x, codes, scale, bits=bits, max_outliers=max_outliers, threshold=3.0)
    assert torch.equal(y, expected)


def special_tokens(k: int) -> Tensor:
    rows = torch.stack(
        [
            torch.zeros(k),
            torch.full((k,), 3.0),
            torch.full((k,), 1e-42),  # denormal: counts as zero
            torch.linspace(-1, 1, k) * 3e38,  # squares overflow
            torch.linspace(-1, 1, k) * 1e-25,  # squares underflow
            torch.arange(k) - 63.5,  # ties at .5
            torch.eye(1, k)[0] * 1e30,  # one huge value
            torch.eye(1, k)[0] * 1e30 + 1.0,
            torch.cat([torch.full((20,), 100.0), torch.full((k - 20,), 0.5)]),  # more ties than the cap
        ]
    )
    return rows


@pytest.mark.parametrize("k", [64, 127, 200])
def test_special_tokens(k):
    codes, _, _, scale, bias = layer(10, k)
    x = special_tokens(k)
    y = ops.quantized_linear(x, ops.pack_weight(codes), scale, bias)
    assert torch.equal(y, reference.quantized_linear(x, codes, scale, bias))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_token_that_is_not_finite_gives_nan_and_spares_the_others(bad):
    codes, _, _, scale, bias = layer(70, 100)
    x = tokens(8, 100)
    clean = ops.quantized_linear(x, ops.pack_weight(codes), scale, bias)
    x[3, 99] = bad
    y = ops.quantized_linear(x, ops.pack_weight(codes), scale, bias)
    assert y[3].isnan().all()
    keep = torch.arange(8) != 3
    assert torch.equal(y[keep], clean[keep])


@given(st.integers(1, 80), st.integers(0, 64), st.sampled_from([2.0, 3.0, 4.0, 6.0]), st.integers(0, 2**31))
@settings(max_examples=150, deadline=None)
def test_run_time_ocs_equals_the_expanded_layer(k, max_outliers, threshold, seed):
    """Exactness: an outlier's code, split in copies within the range, gives the same integers."""
    codes, _, _, scale, _ = layer(8, k, seed=seed % 1000)
    x = tokens(3, k, outliers=min(k, 4), size=20.0, seed=seed)
    y = ops.quantized_linear(x, ops.pack_weight(codes), scale, None, None, 8, max_outliers, threshold)
    q, step = quantize_tokens(x, 8, max_outliers, threshold)
    copies = int((q.abs().max() / 127).ceil().clamp(min=1))
    parts = torch.stack([(q.abs() - 127 * i).clamp(0, 127) * q.sign() for i in range(copies)])
    assert torch.equal(parts.sum(0), q)
    assert parts.abs().max() <= 127
    total = sum(part.long() @ codes.long().T for part in parts)
    assert torch.equal(y, total.float() * (step[:, None] * scale))


def test_tail_equals_expanded_copies():
    """A folded tail column is the copies of its channel, bit for bit."""
    n, k, e = 33, 90, 7
    codes, tail, index, scale, bias = layer(n, k, e)
    x = tokens(11, k)
    expanded = torch.cat([codes, tail], dim=1)
    wide = torch.cat([x, x[:, index.long()]], dim=1)
    q, step = quantize_tokens(x, 8, 16, 4.0)
    q_wide = torch.cat([q, q[:, index.long()]], dim=1)
    assert wide.shape[1] == q_wide.shape[1]
    expected = (q_wide.long() @ expanded.long().T).float() * (step[:, None] * scale) + bias
    assert torch.equal(ops.quantized_linear(x, ops.pack_weight(codes, tail), scale, bias, index), expected)


def test_at_most_max_outliers_codes_lie_beyond_the_range():
    x = tokens(200, 300, outliers=40, size=30.0)
    for cap in (1, 4, 16, 64):
        q, _ = quantize_tokens(x, 8, cap, 4.0)
        assert (q.abs() > 127).sum(1).max() <= cap


@pytest.mark.parametrize("shape", [(100,), (1, 100), (2, 3, 100), (0, 100), (4, 0, 100)])
def test_leading_dimensions(shape):
    codes, _, _, scale, bias = layer(9, 100)
    x = torch.randn(shape)
    y = ops.quantized_linear(x, ops.pack_weight(codes), scale, bias)
    assert y.shape == (*shape[:-1], 9)
    assert torch.equal(y.reshape(-1, 9), ops.quantized_linear(x.reshape(-1, 100), ops.pack_weight(codes), scale, bias))


def test_no_columns_gives_the_bias():
    bias = torch.randn(5)
    packed = ops.pack_weight(torch.empty(5, 0, dtype=torch.int8))
    assert torch.equal(ops.quantized_linear(torch.empty(3, 0), packed, torch.ones(5), bias), bias.expand(3, 5))


def test_views_are_read_as_what_they_show():
    codes, _, _, scale, bias = layer(40, 60)
    packed = ops.pack_weight(codes)
    x = torch.randn(60, 12)
    expected = ops.quantized_linear(x.t().contiguous(), packed, scale, bias)
    assert torch.equal(ops.quantized_linear(x.t(), packed, scale, bias), expected)
    doubled = torch.stack([scale, scale], dim=1)[:, 0]
    assert torch.equal(ops.quantized_linear(x.t(), packed, doubled, bias), expected)
    assert torch.equal(ops.pack_weight(codes.t().contiguous().t()), packed)


def test_threads_do_not_change_the_bits():
    codes, tail, index, scale, bias = layer(500, 700, 20)
    packed, x = ops.pack_weight(codes, tail), tokens(300, 700)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(ops.quantized_linear(x, packed, scale, bias, index))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_gradient_is_that_of_the_dequantized_weight():
    codes, tail, index, scale, bias = layer(30, 50, 4)
    packed = ops.pack_weight(codes, tail)
    x = torch.randn(6, 50, requires_grad=True)
    y = ops.quantized_linear(x, packed, scale, bias, index)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.allclose(x.grad, g @ ops.dequantize_packed(packed, scale, 50, index), rtol=1e-5, atol=1e-4)


def test_opcheck():
    codes, tail, index, scale, bias = layer(20, 30, 3)
    packed = ops.pack_weight(codes, tail)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 4, 30, dtype=dtype)
        torch.library.opcheck(torch.ops.ocsquant.quantized_linear.default, (x, packed, scale, bias, index, 8, 16, 4.0))
        args = (x.requires_grad_(), packed, scale, bias, index, 8, 16, 4.0)
        torch.library.opcheck(torch.ops.ocsquant.quantized_linear_train.default, args)
    torch.library.opcheck(torch.ops.ocsquant.quantized_linear.default, (torch.randn(30), ops.pack_weight(codes), scale))


CHECKSUM = """
import hashlib, torch
import test_quantized_linear as t
from ocsquant import ops
h = hashlib.sha256()
for i, (m, n, k) in enumerate(t.SHAPES + [(200, 129, 1025), (48, 64, 512)]):
    codes, tail, index, scale, bias = t.layer(n, k, min(k, 9), seed=i)
    for x in (t.tokens(m, k, seed=i), t.tokens(m, k, outliers=min(k, 30), seed=i).bfloat16()):
        y = ops.quantized_linear(x, ops.pack_weight(codes, tail), scale, bias, index)
        h.update(y.view(torch.uint8).numpy().tobytes())
w = torch.randn(7, 133)
g = torch.randn_like(w)
splits = torch.randint(1, 3, (133,), dtype=torch.int32)
h.update(ops.fake_quantize_split(w, torch.rand(7) / 9 + 0.01, splits, 4).numpy().tobytes())
for t in torch.ops.ocsquant.fake_quantize_split_backward(g, w, torch.rand(7) / 9 + 0.01, splits, 4):
    h.update(t.numpy().tobytes())
print(ops.cpu_isa()[0], h.hexdigest())
"""


def test_every_level_this_cpu_has_gives_the_same_bits(capsys):
    tests = Path(__file__).parent
    sums = {}
    for level in ("scalar", "avx2", "avx_vnni", "avx512_vnni", "amx_int8"):
        code = "import torch; torch.manual_seed(0)\n" + CHECKSUM
        path = os.pathsep.join([str(tests), str(tests.parent)])
        environment = dict(os.environ, OCSQUANT_ISA=level, PYTHONPATH=path)
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        if "does not support it" in run.stderr:
            with capsys.disabled():
                print(f"\nskipped {level}: this CPU lacks it")
            continue
        assert run.returncode == 0, run.stderr
        name, sums[level] = run.stdout.split()
        assert name == level
    assert len(set(sums.values())) == 1
