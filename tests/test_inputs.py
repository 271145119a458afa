"""What reaches each weight: patches of convolutions, sequences and hidden states of recurrent layers."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import ocsquant
from ocsquant import inputs
from ocsquant.inputs import columns, tokens


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv1d(3, 5, 4, stride=2, padding=3), (2, 3, 11)),
        (nn.Conv2d(3, 5, (3, 2), stride=(1, 2), dilation=(2, 1), padding="valid"), (2, 3, 9, 8)),
        (nn.Conv2d(3, 5, 3, padding="same", padding_mode="reflect"), (2, 3, 6, 7)),
        (nn.Conv3d(2, 4, 2, padding=1), (2, 2, 3, 4, 5)),
        (nn.Conv2d(3, 5, 3), (3, 6, 7)),
    ],
)
def test_patches_times_the_weight_are_the_convolution(conv, shape, monkeypatch):
    x = torch.randn(shape)
    monkeypatch.setattr(inputs, "PATCHES", 100)
    names, parts = zip(*columns(conv, x, None), strict=True)
    patches = torch.cat(parts)
    y = conv(x).detach()
    spatial = len(conv.kernel_size)
    expected = y.movedim(-spatial - 1, -1).reshape(-1, conv.out_channels)
    got = patches @ conv.weight.detach().reshape(conv.out_channels, -1).T + conv.bias.detach()
    assert set(names) == {"weight"}
    assert len(parts) == (x.shape[0] if x.dim() == spatial + 2 else 1)
    assert torch.allclose(got, expected, atol=1e-5)


def test_a_grouped_convolution_has_no_single_matrix():
    assert list(columns(nn.Conv2d(4, 4, 3, groups=2), torch.randn(1, 4, 5, 5), None)) == []


def stack(kind: str, **options) -> nn.Module:
    torch.manual_seed(3)
    return getattr(nn, kind)(6, 4, 2, **options).eval()


def first_gates(module: nn.Module, x: torch.Tensor, h: torch.Tensor, layer: str) -> torch.Tensor:
    """The gates before their nonlinearities, for tokens in which both inputs are known."""
    return (
        x @ getattr(module, f"weight_ih_{layer}").T
        + getattr(module, f"bias_ih_{layer}")
        + h @ getattr(module, f"weight_hh_{layer}").T
        + getattr(module, f"bias_hh_{layer}")
    )


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bidirectional": True}, {"proj_size": 3, "bidirectional": True}]
)
@pytest.mark.parametrize("given", [True, False])
def test_states_of_an_lstm(options, given):
    module = stack("LSTM", **options)
    steps, batch, directions = 5, 3, 2 if module.bidirectional else 1
    x = torch.randn(steps, batch, 6)
    size = module.proj_size or module.hidden_size
    state = (torch.randn(2 * directions, batch, size), torch.randn(2 * directions, batch, 4)) if given else None
    fed = x.transpose(0, 1) if module.batch_first else x
    seen = dict(tokens(module, fed, state))
    assert set(seen) == {n for n, _ in module.named_parameters() if n.startswith(("weight_ih", "weight_hh"))}
    y = module(fed, state)[0]
    y = y.transpose(0, 1) if module.batch_first else y
    assert torch.equal(seen["weight_ih_l0"], x.reshape(-1, 6))
    # The last layer's states are its own outputs, one step later; backwards, one step earlier.
    start = state[0] if given else torch.zeros(2 * directions, batch, size)
    forward = seen["weight_hh_l1"].view(steps, batch, size)
    assert torch.allclose(forward[1:], y[:-1, :, :size], atol=1e-6)
    assert torch.equal(forward[0], start[directions])
    if module.bidirectional:
        backward = seen["weight_hh_l1_reverse"].view(steps, batch, size)
        assert torch.allclose(backward[:-1], y[1:, :, size:], atol=1e-6)
        assert torch.equal(backward[-1], start[3])


def test_states_of_a_gru_give_its_gates():
    module = stack("GRU")
    x = torch.randn(5, 3, 6)
    seen = dict(tokens(module, x, None))
    y = module(x)[0]
    gates = first_gates(module, seen["weight_ih_l1"], seen["weight_hh_l1"], "l1")
    size = module.hidden_size
    reset = torch.sigmoid(gates[:, :size])
    h = seen["weight_hh_l1"]
    inner = seen["weight_ih_l1"] @ module.weight_ih_l1[2 * size :].T + module.bias_ih_l1[2 * size :]
    new = torch.tanh(inner + reset * (h @ module.weight_hh_l1[2 * size :].T + module.bias_hh_l1[2 * size :]))
    update = torch.sigmoid(gates[:, size : 2 * size])
    assert torch.allclose((1 - update) * new + update * h, y.reshape(-1, size), atol=1e-6)


def test_packed_sequences_leave_out_the_padding():
    module = stack("LSTM", bidirectional=True)
    sequences = [torch.randn(n, 6) for n in (2, 5, 3)]
    packed = pack_sequence(sequences, enforce_sorted=False)
    seen = dict(tokens(module, packed, None))
    assert all(x.shape[0] == 10 for x in seen.values())
    alone = [dict(tokens(module, x, None)) for x in sequences]
    for name, x in seen.items():
        together = torch.cat([part[name] for part in alone])
        assert torch.allclose(x.sort(0).values, together.sort(0).values, atol=1e-6), name


def test_calibration_sees_every_recurrent_weight():
    module = nn.Sequential(stack("LSTM", batch_first=True))
    with ocsquant.calibrate(module) as seen:
        module(torch.randn(2, 7, 6))
    assert set(seen) == {f"0.weight_{kind}_l{layer}" for kind in ("ih", "hh") for layer in range(2)}
    assert all(layer.count == 14 for layer in seen.values())
    unbatched = stack("GRU")
    with ocsquant.calibrate(unbatched) as seen:
        unbatched(torch.randn(7, 6))
    assert seen["weight_hh_l0"].count == 7
