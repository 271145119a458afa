"""Weights of 6, 4 and 2 bits: stored in as many, multiplied to the same bits as whole bytes."""

import copy

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ocsquant
from ocsquant import OCS, Recipe, SplitQuant, Weights, ops
from ocsquant.records import layer_from

KINDS = ("middle", "zero", "levels")


def codes_of(n, k, bits, kind, group_size=0):
    """Random codes int8 [n, k] that `bits` bits can express, and zero and levels."""
    numbers = torch.randint(0, 2**bits, (n, k))
    numbers[0] = 0
    numbers[-1] = 2**bits - 1
    if kind == "levels":
        levels = torch.randint(-128, 128, (2**bits,), dtype=torch.int8)
        return levels[numbers], None, levels
    if kind == "middle":
        return (numbers - 2 ** (bits - 1)).to(torch.int8), None, None
    size = group_size or max(k, 1)
    zero = torch.randint(0, 2**bits, (-(-k // size) if group_size else 1, n), dtype=torch.uint8)
    return (numbers - zero.T.long().repeat_interleave(size, 1)[:, :k]).to(torch.int8), zero, None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_bits_of_the_reference(bits, kind):
    n, k = 70, 300
    codes, zero, levels = codes_of(n, k, bits, kind)
    tail, index = torch.randint(-127, 128, (n, 3), dtype=torch.int8), torch.tensor([0, 7, 299], dtype=torch.int32)
    scale, bias = torch.rand(n), torch.randn(n)
    for m in (1, 3, 9):
        x = torch.randn(m, k)
        x[:, 17] = 30.0
        for extra, at in ((None, None), (tail, index)):
            packed = ops.pack_weight(codes, extra, bits, zero, levels)
            y = ops.quantized_linear(x, packed, scale, bias, at, 8, 16, 4.0, 0, bits, zero, levels)
            assert torch.equal(y, reference.quantized_linear(x, codes, scale, bias, extra, at))


@settings(deadline=None)
@given(
    m=st.integers(1, 9),
    n=st.integers(1, 130),
    k=st.integers(1, 280),
    bits=st.sampled_from([2, 4, 6]),
    kind=st.sampled_from(KINDS),
    groups=st.sampled_from([0, 16, 48, 128]),
)
def test_every_width_multiplies_as_bytes_do(m, n, k, bits, kind, groups):
    codes, zero, levels = codes_of(n, k, bits, kind, groups)
    packed = ops.pack_weight(codes, None, bits, zero, levels, groups)
    assert torch.equal(ops.unpack_weight(packed, n, k, 0, bits, zero, levels, groups)[0], codes)
    scale = torch.rand(-(-k // groups), n) if groups else torch.rand(n)
    x = torch.randn(m, k) * 3
    whole = ops.quantized_linear(x, ops.pack_weight(codes), scale, group_size=groups)
    y = ops.quantized_linear(x, packed, scale, None, None, 8, 16, 4.0, groups, bits, zero, levels)
    assert torch.equal(y, whole)
    weight = ops.dequantize_packed(packed, scale, k, None, groups, bits, zero, levels)
    assert torch.equal(weight, ops.dequantize_packed(ops.pack_weight(codes), scale, k, None, groups))


def test_layout_is_the_documented_one():
    """1024 numbers of 16 channels in planes: of four bits, halves of groups 0 and 1, then 2 and 3; of two bits."""
    numbers = torch.randint(0, 64, (64, 16))
    span = numbers.reshape(64, 4, 4).transpose(0, 1).reshape(4, 256)
    four = (span & 15)[:2] | (span & 15)[2:] << 4
    two = sum((span >> 4)[g] << 2 * g for g in range(4))
    packed = ops.pack_weight((numbers - 32).to(torch.int8), None, 6).flatten()
    assert torch.equal(packed[:512], four.flatten().to(torch.uint8))
    assert torch.equal(packed[512:768], two.to(torch.uint8))
    assert packed.numel() == 768 + 256  # and the bounds


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.full((70, 30), 8, dtype=torch.int8)}, "codes must be what weight_bits and zero can hold"),
        ({"weight_bits": 3}, "weight_bits must be 8, 6, 4 or 2, got 3"),
        ({"zero": torch.zeros(2, 70, dtype=torch.uint8)}, r"zero must be \[1, 70\], got \[2, 70\]"),
        ({"zero": torch.full((1, 70), 16, dtype=torch.uint8)}, "zero must be below 16, got 16"),
        ({"levels": torch.arange(17, dtype=torch.int8)}, r"levels must have 1\.\.16 entries, got 17"),
        ({"levels": torch.tensor([1, 2], dtype=torch.int8)}, "codes must be entries of levels"),
    ],
)
def test_what_cannot_be_stored_is_named(change, message):
    call = {"codes": torch.zeros(70, 30, dtype=torch.int8), "weight_bits": 4}
    with pytest.raises(RuntimeError, match=f"pack_weight: {message}"):
        ops.pack_weight(**call | change)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 512))


RECIPES = {
    "6 bits": (Recipe(Weights(bits=6)), 6),
    "5 bits": (Recipe(Weights(bits=5)), 6),
    "W4A8": ("W4A8", 4),
    "4 bits, split": (Recipe(Weights(bits=4, split=OCS(expand_ratio=0.05))), 4),
    "3 bits, zero points": (Recipe(Weights(bits=3, symmetric=False)), 4),
    "W2A8": ("W2A8", 4),  # 12 levels
    "48 levels": (Recipe(Weights(bits=4, split=SplitQuant())), 6),
    "2 bits": (Recipe(Weights(bits=2)), 2),
    "4 bits, folded": (Recipe(Weights(bits=4), ocsquant.PerChannelStatic()), 4),
    "a table of every row": (Recipe(Weights(bits=2, split=SplitQuant(clusters="row", ranges="row"))), 8),
}


@pytest.mark.parametrize("name", RECIPES)
def test_layers_take_the_bytes_their_bits_need(name, tmp_path):
    recipe, width = RECIPES[name]
    model, x = network(), torch.randn(6, 512)
    simulated = ocsquant.quantize(copy.deepcopy(model), recipe, simulate=True, calibration=[x])
    integer = ocsquant.quantize(copy.deepcopy(model), recipe, calibration=[x], fuse=False)
    with torch.no_grad():
        assert torch.equal(integer(x), simulated(x))
    for layer in (integer[0], integer[2]):
        assert layer.weight_bits == width
        weights, tail = layer.weight_shape.numel(), layer.split_channels * layer.out_features * 8
        assert layer.packed.numel() <= (weights * width + tail) / 8 * 1.1
    ocsquant.save(integer, tmp_path / "file")
    assert torch.equal(ocsquant.load(network(), tmp_path / "file")(x), integer(x))
    leaf, g = x.clone().requires_grad_(), torch.randn(6, 256)
    integer[0](leaf).backward(g)
    torch.testing.assert_close(leaf.grad, g @ integer[0].weight, rtol=1e-4, atol=1e-4)


def test_compile_export_and_opcheck():
    model, x = ocsquant.quantize(network(), "W2A8"), torch.randn(6, 512)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
        assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))
    codes, zero, _ = codes_of(70, 30, 4, "zero")
    packed = ops.pack_weight(codes, None, 4, zero)
    torch.library.opcheck(torch.ops.ocsquant.pack_weight.default, (codes, None, 4, zero))
    torch.library.opcheck(torch.ops.ocsquant.unpack_weight.default, (packed, 70, 30, 0, 4, zero))
    arguments = (packed, torch.rand(70), None, None, 8, 16, 4.0, 0, 4, zero)
    torch.library.opcheck(torch.ops.ocsquant.quantized_linear_narrow.default, (torch.randn(5, 30), *arguments))
    leaf = torch.randn(5, 30, requires_grad=True)
    torch.library.opcheck(torch.ops.ocsquant.quantized_linear_train.default, (leaf, *arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(zero=t["zero"] + 16), "zero must be uint8, for every scale one below"),
        (lambda t: t.update(zero=t["zero"][:1]), "zero must be uint8, for every scale one below"),
        (lambda t: t.update(levels=torch.zeros(16, dtype=torch.int8)), "it has levels and zero points"),
        (lambda t: t.update(packed=t["packed"][:, :-1]), "packed must be uint8"),
    ],
)
def test_a_record_that_does_not_fit_is_refused(change, message):
    layer = ocsquant.quantize(network(), "W4A8")[0]
    tensors = {name: b for name, b in layer.named_buffers() if b is not None}
    assert torch.equal(layer_from("0", nn.Linear(512, 256), layer.settings(), tensors).weight, layer.weight)
    change(tensors)
    with pytest.raises(ocsquant.CorruptCheckpointError, match=f"layer '0': {message}"):
        layer_from("0", nn.Linear(512, 256), layer.settings(), tensors)
