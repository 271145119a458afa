"""quantized_lstm and quantized_gru, step by step against the definition: integers exactly, the gates in float64."""

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ocsquant import ops


def weights(outputs, inputs, bias=True):
    codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8)
    scale = (torch.rand(outputs) + 0.5) / 127 / inputs**0.5 * 3
    return codes, scale, torch.randn(outputs) * 0.3 if bias else None


def step_rows(rows, batch, sizes):
    """First row and number of rows of each step."""
    sizes = [batch] * (rows // max(batch, 1)) if sizes is None else sizes.tolist()
    return [(sum(sizes[:t]), size) for t, size in enumerate(sizes)]


def check_lstm(gates, h, c, weight, sizes, reverse, projection=None):
    """Every step from what the operator itself gave for the last one: no rounding error is carried along."""
    codes, scale, bias = weight
    project = () if projection is None else (ops.pack_weight(projection[0]), projection[1])
    y, last_h, last_c = ops.quantized_lstm(
        gates, h, c, ops.pack_weight(codes), scale, bias, None, 8, 16, 4.0, 0, 8, None, None, sizes, reverse, *project
    )
    h, c = h.clone(), c.double()
    steps = step_rows(gates.shape[0], h.shape[0], sizes)
    for first, count in reversed(steps) if reverse else steps:
        recurrent = reference.quantized_linear(h[:count], codes, scale, bias)
        output, c[:count] = reference.lstm_step(gates[first : first + count], recurrent, c[:count])
        got = y[first : first + count]
        if projection is None:
            torch.testing.assert_close(got.double(), output, rtol=0, atol=2e-6)
        else:  # a last bit of the output may be another code of the projection
            expected = reference.quantized_linear(output.float(), *projection)
            torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
        h[:count] = got
    assert torch.equal(last_h, h)
    torch.testing.assert_close(last_c.double(), c, rtol=0, atol=1e-5)


def check_gru(gates, h, weight, sizes, reverse):
    codes, scale, bias = weight
    packed = ops.pack_weight(codes)
    y, last = ops.quantized_gru(gates, h, packed, scale, bias, None, 8, 16, 4.0, 0, 8, None, None, sizes, reverse)
    h = h.clone()
    steps = step_rows(gates.shape[0], h.shape[0], sizes)
    for first, count in reversed(steps) if reverse else steps:
        recurrent = reference.quantized_linear(h[:count], codes, scale, bias)
        expected = reference.gru_step(gates[first : first + count], recurrent, h[:count])
        torch.testing.assert_close(y[first : first + count].double(), expected, rtol=0, atol=2e-6)
        h[:count] = y[first : first + count]
    assert torch.equal(last, h)


@settings(max_examples=250, deadline=None)
@given(
    hidden=st.integers(1, 40),
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5),
    packed=st.booleans(),
    reverse=st.booleans(),
    bias=st.booleans(),
    size=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
)
def test_lstm_and_gru_step_by_step(hidden, lengths, packed, reverse, bias, size):
    lengths, batch = sorted(lengths, reverse=True), len(lengths)
    sizes = torch.tensor([sum(n > t for n in lengths) for t in range(lengths[0])]) if packed else None
    rows = sum(lengths) if packed else batch * lengths[0]
    h, c = torch.randn(batch, hidden), torch.randn(batch, hidden)
    check_lstm(torch.randn(rows, 4 * hidden) * size, h, c, weights(4 * hidden, hidden, bias), sizes, reverse)
    check_gru(torch.randn(rows, 3 * hidden) * size, h, weights(3 * hidden, hidden, bias), sizes, reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_projection(reverse):
    hidden, outputs, batch = 24, 10, 3
    projection = weights(outputs, hidden, bias=False)[:2]
    gates, h, c = torch.randn(4 * batch, 4 * hidden), torch.randn(batch, outputs), torch.randn(batch, hidden)
    check_lstm(gates, h, c, weights(4 * hidden, outputs), None, reverse, projection)


def test_special_values_and_empty_batches():
    weight = weights(4 * 8, 8)
    packed, scale, bias = ops.pack_weight(weight[0]), *weight[1:]
    gates, h, c = torch.randn(6, 32), torch.zeros(2, 8), torch.zeros(2, 8)
    gates[0, 3], gates[3, 30] = float("nan"), float("inf")
    y, *_ = ops.quantized_lstm(gates, h, c, packed, scale, bias)
    assert y[0].isnan().tolist() == [False] * 3 + [True] + [False] * 4
    assert y[2].isnan().all()  # the sequence goes on from there
    assert y[[1, 3, 5]].isfinite().all()
    y, last, cell = ops.quantized_lstm(gates[:0], h[:0], c[:0], packed, scale, bias)
    assert (y.shape, last.shape, cell.shape) == ((0, 8), (0, 8), (0, 8))
    with pytest.raises(RuntimeError, match="gates must have a multiple of 0 rows"):
        ops.quantized_lstm(gates, h[:0], c[:0], packed, scale, bias)
    y, last, _ = ops.quantized_lstm(gates[:0], h, c, packed, scale, bias)
    assert torch.equal(last, h)
    assert y.shape == (0, 8)


def test_threads_give_the_same_bits():
    hidden, batch = 300, 70
    codes, scale, bias = weights(4 * hidden, hidden)
    arguments = (
        torch.randn(3 * batch, 4 * hidden),
        *torch.randn(2, batch, hidden),
        ops.pack_weight(codes),
        scale,
        bias,
    )
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = ops.quantized_lstm(*arguments)
        torch.set_num_threads(2)
        two = ops.quantized_lstm(*arguments)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_weights_of_every_storage():
    hidden, batch = 48, 3
    gates, h, c = torch.randn(2 * batch, 4 * hidden), torch.randn(batch, hidden), torch.randn(batch, hidden)
    zero = torch.randint(0, 16, (3, 4 * hidden), dtype=torch.uint8)
    codes = (torch.randint(0, 16, (4 * hidden, hidden)) - zero.T.long().repeat_interleave(16, 1)).to(torch.int8)
    scale = torch.rand(3, 4 * hidden) * 0.05
    packed = ops.pack_weight(codes, None, 4, zero, None, 16)
    y, *_ = ops.quantized_lstm(gates, h, c, packed, scale, None, None, 8, 16, 4.0, 16, 4, zero)
    whole, *_ = ops.quantized_lstm(gates, h, c, ops.pack_weight(codes), scale, group_size=16)
    assert torch.equal(y, whole)


def test_opcheck():
    codes, scale, bias = weights(32, 8)
    gates, h, c = torch.randn(6, 32), torch.randn(2, 8), torch.randn(2, 8)
    lstm = (gates, h, c, ops.pack_weight(codes), scale, bias)
    torch.library.opcheck(torch.ops.ocsquant.quantized_lstm.default, lstm)
    codes, scale, bias = weights(24, 8)
    gru = (gates[:, :24], h, ops.pack_weight(codes), scale, bias)
    torch.library.opcheck(torch.ops.ocsquant.quantized_gru.default, gru)
