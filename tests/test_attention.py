"""nn.MultiheadAttention and the transformer layers around it: the same results, and the op really called."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import ocsquant
from ocsquant.nn import QuantizedLinear, QuantizedMultiheadAttention


class CallCounter(TorchDispatchMode):
    """Counts calls of the quantized linear."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += str(func).startswith("ocsquant.quantized_linear")
        return func(*args, **(kwargs or {}))


def float_copy(attention: nn.MultiheadAttention) -> QuantizedMultiheadAttention:
    """Our forward over float weights: must equal nn.MultiheadAttention's."""
    clone = copy.deepcopy(attention)
    clone.__class__ = QuantizedMultiheadAttention
    return clone


VARIANTS = {
    "plain": ({}, {}),
    "batch_first": ({"batch_first": True}, {}),
    "no weights": ({"batch_first": True}, {"need_weights": False}),
    "weights of each head": ({}, {"average_attn_weights": False}),
    "no bias": ({"bias": False}, {}),
    "other key and value sizes": ({"kdim": 20, "vdim": 12}, {}),
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("mask", [None, "bool", "float", "per head", "padding", "both"])
def test_forward_is_that_of_torch(name, mask):
    options, call = VARIANTS[name]
    batch, queries, keys = 3, 5, 7
    attention = nn.MultiheadAttention(48, 4, **options).eval()
    q, k, v = torch.randn(queries, batch, 48), torch.randn(keys, batch, options.get("kdim", 48)), None
    v = torch.randn(keys, batch, options.get("vdim", 48))
    if options.get("batch_first"):
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
    call = dict(call)
    if mask in ("bool", "both"):
        call["attn_mask"] = torch.ones(queries, keys, dtype=torch.bool).triu(3)
    elif mask == "float":
        call["attn_mask"] = torch.randn(queries, keys)
    elif mask == "per head":
        call["attn_mask"] = torch.randn(batch * 4, queries, keys)
    if mask in ("padding", "both"):
        call["key_padding_mask"] = torch.tensor([[False] * (keys - i) + [True] * i for i in range(batch)])
    expected, expected_weights = attention(q, k, v, **call)
    got, weights = float_copy(attention)(q, k, v, **call)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert (weights is None) == (expected_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, expected_weights, rtol=1e-4, atol=1e-5)


def test_self_attention_and_unbatched_input():
    attention = nn.MultiheadAttention(48, 4).eval()
    for x in (torch.randn(5, 2, 48), torch.randn(5, 48)):
        expected = attention(x, x, x)
        got = float_copy(attention)(x, x, x)
        assert got[0].shape == expected[0].shape
        torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-5)
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
    x = torch.randn(5, 2, 48)
    expected = attention(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
    got = float_copy(attention)(x, x, x, attn_mask=causal, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_dropout_in_training():
    attention = float_copy(nn.MultiheadAttention(48, 4, dropout=0.5)).train()
    x = torch.randn(5, 2, 48)
    assert not torch.equal(attention(x, x, x)[0], attention(x, x, x)[0])


@pytest.mark.parametrize("root", [True, False])
def test_output_projection_is_quantized_and_called(root):
    attention = nn.MultiheadAttention(128, 4, batch_first=True).eval()
    model = attention if root else nn.ModuleDict({"attention": attention})
    x = torch.randn(2, 9, 128)
    expected = attention(x, x, x)[0]
    ocsquant.quantize(model)
    assert isinstance(attention.out_proj, QuantizedLinear)
    assert attention.out_proj.weight.shape == (128, 128)
    with torch.inference_mode(), CallCounter() as counter:
        got = attention(x, x, x)[0]
    assert counter.calls == 1
    assert (got - expected).norm() < 0.02 * expected.norm()
    assert any("stay float" in layer.reason for layer in ocsquant.report(model).layers)


@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoder_leaves_its_fused_path(norm_first):
    layer = nn.TransformerEncoderLayer(128, 4, 160, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()
    x = torch.randn(2, 9, 128)
    padding = torch.zeros(2, 9, dtype=torch.bool)
    padding[1, 6:] = True
    with torch.inference_mode():
        expected = encoder(x, src_key_padding_mask=padding)
    ocsquant.quantize(encoder)
    for mask in (None, padding):
        with torch.inference_mode(), CallCounter() as counter:
            got = encoder(x, src_key_padding_mask=mask)
        assert counter.calls == 2 * 3
    assert (got - expected)[~padding].norm() < 0.05 * expected[~padding].norm()
    assert any("switched off" in layer.reason for layer in ocsquant.report(encoder).layers)
    assert torch.equal(copy.deepcopy(encoder)(x), encoder(x))


def test_attention_that_cannot_be_replaced_stays_float_by_name():
    for options in ({"add_bias_kv": True}, {"add_zero_attn": True}):
        model = nn.ModuleDict({"a": nn.MultiheadAttention(128, 4, **options), "l": nn.Linear(128, 128)})
        ocsquant.quantize(model)
        assert type(model["a"]) is nn.MultiheadAttention
        assert "not supported" in {r.path: r.reason for r in ocsquant.report(model).layers}["a.out_proj"]

    class Own(nn.MultiheadAttention):
        pass

    model = nn.ModuleDict({"a": Own(128, 4), "l": nn.Linear(128, 128)})
    ocsquant.quantize(model)
    assert not isinstance(model["a"].out_proj, QuantizedLinear)
