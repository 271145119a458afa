import pytest
import torch

from ocsquant import ops


@pytest.mark.parametrize(("n", "k", "e"), [(1, 1, 0), (64, 4, 4), (65, 5, 3), (130, 33, 1), (3, 0, 0), (0, 7, 0)])
def test_round_trip(n, k, e):
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    tail = torch.randint(-127, 128, (n, e), dtype=torch.int8)
    packed = ops.pack_weight(codes, tail if e else None)
    assert packed.shape == (-(-n // 64), -(-k // 4) + -(-e // 4) + (k + e > 0), 64, 4)
    base, rest = ops.unpack_weight(packed, n, k, e)
    assert torch.equal(base, codes)
    assert torch.equal(rest, tail)


def test_layout_is_the_documented_one():
    """Blocks of 64 columns x 4 channels, code + 128; then a byte for every 16 channels that bounds their norms."""
    n, k = 70, 30
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    packed = ops.pack_weight(codes)
    for j, c in [(0, 0), (5, 3), (63, 9), (64, 0), (69, 29)]:
        assert packed[j // 64, c // 4, j % 64, c % 4] == int(codes[j, c]) + 128
    assert (packed[1, :-1, 6:] == 128).all()  # padding is code 0
    padded = torch.nn.functional.pad(codes.double(), (0, 2, 0, 58)).reshape(2, 64, 2, 4, 2, 2)
    norms = padded.square().sum((3, 5)).amax((1, 3)).sqrt()  # panel, output, span, block, lane, channel of it
    bounds = packed[:, -1].reshape(2, 256)
    assert torch.equal(bounds[:, :2].double(), (norms / 2).ceil())
    assert not bounds[:, 2:].any()


def test_opcheck():
    codes, tail = torch.ones(70, 9, dtype=torch.int8), torch.ones(70, 2, dtype=torch.int8)
    torch.library.opcheck(torch.ops.ocsquant.pack_weight.default, (codes, tail))
    torch.library.opcheck(torch.ops.ocsquant.pack_weight.default, (codes,))
    torch.library.opcheck(torch.ops.ocsquant.unpack_weight.default, (ops.pack_weight(codes, tail), 70, 9, 2))
