"""Weights that are only stored quantized: packing and what the codes stand for."""

import pytest
import torch

from ocsquant import ops

import reference  # isort: skip

BITS = range(2, 9)


def codes(n: int, k: int, bits: int) -> torch.Tensor:
    return torch.randint(2**bits, (n, k), dtype=torch.uint8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [0, 1, 7, 8, 9, 64, 100])
def test_packing(bits, k):
    c = codes(3, k, bits)
    packed = ops.pack_codes(c, bits)
    assert torch.equal(packed, reference.pack_codes(c, bits))
    one = torch.ones(3, min(k, 1))
    assert torch.equal(ops.dequantize_weight(packed, one, k, bits, 1000, torch.zeros_like(one)), c.float())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k", "group_size"), [(5, 70, 70), (4, 70, 12), (3, 129, 32), (2, 1100, 128), (1, 9, 1)])
def test_values(bits, n, k, group_size):
    c, groups = codes(n, k, bits), -(-k // group_size)
    packed, scale = ops.pack_codes(c, bits), torch.rand(n, groups) + 0.1
    zero = torch.randint(2**bits, (n, groups)).float()
    for z in (None, zero):
        got = ops.dequantize_weight(packed, scale, k, bits, group_size, z)
        assert torch.equal(got, reference.dequantize_weight(c, scale, bits, group_size, z))
    if bits <= 6:
        for books in {1, n}:
            levels = torch.randint(-127, 128, (books, 2**bits), dtype=torch.int8)
            got = ops.dequantize_weight(packed, scale, k, bits, group_size, None, levels)
            assert torch.equal(got, reference.dequantize_weight(c, scale, bits, group_size, None, levels))
    rows = torch.randint(n, (7,))
    whole = ops.dequantize_weight(packed, scale, k, bits, group_size)
    assert torch.equal(ops.dequantize_weight(packed, scale, k, bits, group_size, rows=rows), whole[rows])


def test_many_rows_and_strides():
    c, scale = codes(4000, 100, 3), torch.rand(4000, 4)
    packed = ops.pack_codes(c, 3)
    whole = ops.dequantize_weight(packed, scale, 100, 3, 25)
    assert torch.equal(whole, (c.float() - 4) * scale.repeat_interleave(25, 1))
    assert torch.equal(ops.dequantize_weight(packed[::2], scale[::2], 100, 3, 25), whole[::2])
    assert ops.dequantize_weight(packed, scale, 100, 3, 25, rows=torch.zeros(0, dtype=torch.int64)).shape == (0, 100)


def test_an_index_beyond_the_levels_gives_zero():
    levels = torch.full((1, 3), 5, dtype=torch.int8)
    packed = ops.pack_codes(torch.arange(4, dtype=torch.uint8)[None], 2)
    got = ops.dequantize_weight(packed, torch.ones(1, 1), 4, 2, 4, None, levels)
    assert got.tolist() == [[5.0, 5.0, 5.0, 0.0]]


def test_opcheck():
    c = codes(6, 20, 4)
    packed, scale = ops.pack_codes(c, 4), torch.rand(6, 3)
    op = torch.ops.ocsquant.dequantize_weight.default
    torch.library.opcheck(torch.ops.ocsquant.pack_codes.default, (c, 4))
    torch.library.opcheck(op, (packed, scale, 20, 4, 8))
    torch.library.opcheck(op, (packed, scale, 20, 4, 8, scale.clone(), None, torch.tensor([3, 0])))
    levels = torch.zeros(6, 16, dtype=torch.int8)
    torch.library.opcheck(op, (packed, scale, 20, 4, 8, None, levels))
