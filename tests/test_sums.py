"""Convolutions that add a residual before the nonlinearity they compute: what proves it, and what else may come."""

import copy

import pytest
import torch
from torch import nn

import ocsquant
from ocsquant.nn import FusedNonlinearity
from ocsquant.nn.sums import PendingSum
from ocsquant.source import sums


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1)
        self.act = nn.ReLU()

    def forward(self, x):
        return self.act(self.conv(x) + x)


class Reversed(Residual):
    def forward(self, x):
        return self.act(x + self.conv(x))


class TwoConvolutions(Residual):
    def forward(self, x):
        return self.act(self.conv(x) + self.other(x))


class Statements(Residual):
    def forward(self, x):
        h = self.conv(x)
        if x.shape[0] > 1:
            x = self.other(x)
        h += x
        h = self.act(h)
        return h


class Sum(Residual):
    def forward(self, x):
        h = self.conv(x)
        y = self.other(x)
        h = y + h
        return self.act(h)


class InTheCall(Residual):
    def forward(self, x):
        h = self.conv(x)
        y = self.other(x)
        return self.act(h + y)


class Scaled(Residual):
    """By a number: no residual of the output's sizes."""

    def forward(self, x):
        return self.act(self.conv(x) + 0.5)


class Broadcast(Residual):
    def forward(self, x):
        return self.act(self.conv(x) + x.mean((2, 3), keepdim=True))


class Widened(Residual):
    def forward(self, x):
        return self.act(self.conv(x) + x.double())


class Between(Residual):
    def forward(self, x):
        h = self.conv(x)
        y = h.mean()
        h += x
        return self.act(h) + y


class After(Residual):
    def forward(self, x):
        h = self.conv(x)
        h += x
        y = self.act(h)
        return y + h


class AddedTwice(Residual):
    def forward(self, x):
        h = self.conv(x)
        h += x
        h += x
        return self.act(h)


class ToItself(Residual):
    def forward(self, x):
        h = self.conv(x)
        h += h
        return self.act(h)


class Less(Residual):
    def forward(self, x):
        return self.act(self.conv(x) - x)


class Into(Residual):
    """What is added to is not the convolution's."""

    def forward(self, x):
        y = self.other(x)
        h = self.conv(x)
        y += h
        return self.act(y)


class ReadLater(Residual):
    def forward(self, x):
        h = self.conv(x)
        y = self.act(h + x)
        return y * h


PROVEN = [Residual, Reversed, TwoConvolutions, Statements, Sum, InTheCall, Scaled, Broadcast, Widened]
OPEN = [Between, After, AddedTwice, ToItself, Less, ReadLater]


def quantize(model, **options):
    """By name: also what would not gain on this CPU."""
    return ocsquant.quantize(model, overrides={"*": "W8A8"}, **options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cls", PROVEN)
def test_a_proven_sum_is_the_convolutions(cls, layout, tmp_path):
    torch.manual_seed(0)
    assert sums(cls())["conv"] == ("act", True)
    model = cls().eval().to(memory_format=layout)
    x = torch.randn(2, 64, 7, 6).contiguous(memory_format=layout)
    plain, made = quantize(copy.deepcopy(model)), quantize(copy.deepcopy(model), fuse=x)
    assert made.conv.adds
    assert not made.other.adds
    assert "computes the sum and the relu" in str(ocsquant.report(made))
    with torch.no_grad():
        assert isinstance(made.conv(x), PendingSum)
        y = made(x)
        assert torch.equal(y, plain(x))
        for given in (x.bfloat16(), x[:1], x[0]) if cls not in (Broadcast, Widened) else (x[:1],):
            assert torch.equal(made(given), plain(given))
        ocsquant.save(made, tmp_path / "file")
        for again in (ocsquant.load(cls().eval(), tmp_path / "file"), copy.deepcopy(made)):
            assert again.conv.adds
            assert torch.equal(again(x), y)
        torch.compiler.reset()
        assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x), plain(x))
        assert torch.equal(torch.export.export(made, (x,)).module()(x), plain(x))
    with torch.inference_mode():
        assert torch.equal(made(x), y)
    assert torch.equal(made(x), plain(x))  # with gradients: the same operations


@pytest.mark.parametrize("cls", OPEN)
def test_what_is_not_proven_stays(cls):
    assert "conv" not in sums(cls())
    made = quantize(cls().eval(), fuse=True)
    assert not made.conv.adds
    assert not any(isinstance(m, FusedNonlinearity) for m in made.modules())


def test_the_one_that_is_written_into_may_be_the_convolutions():
    assert sums(Into()) == {"other": ("act", True)}


def test_other_readers_get_the_convolutions_output():
    torch.manual_seed(0)
    x = torch.randn(2, 64, 7, 6)
    made = quantize(Residual().eval(), fuse=True)
    plain = made.conv(x).detach()  # with gradients enabled
    with torch.no_grad():
        assert torch.equal(torch.sub(made.conv(x), 1), plain - 1)
        assert torch.equal(torch.cat([made.conv(x), plain]), torch.cat([plain, plain]))
        assert torch.equal(torch.add(made.conv(x), x, alpha=2), plain + 2 * x)
        assert torch.equal(torch.add(x, made.conv(x)), torch.relu(x + plain))
        assert torch.equal(made.conv(x) + made.conv(x), torch.relu(plain + plain))
        assert made.conv(x).shape == plain.shape
        read = made.conv(x)
        assert read.mean() == plain.mean()
        assert torch.equal(read + x, torch.relu(plain + x))
        assert torch.equal(copy.copy(made.conv(x)) + x, torch.relu(plain + x))
        with pytest.raises(ocsquant.ArgumentError, match="fuse=False"):
            made.act(made.conv(x))


def test_a_hook_gets_a_tensor_and_is_refused():
    made, x = quantize(Residual().eval(), fuse=True), torch.randn(2, 64, 7, 6)
    seen = []
    made.conv.register_forward_hook(lambda module, args, y: seen.append(type(y)))
    with torch.no_grad(), pytest.raises(ocsquant.ArgumentError, match="fuse=False"):
        made(x)
    assert seen == [torch.Tensor]


def test_a_file_that_adds_wants_a_model_that_does(tmp_path):
    ocsquant.save(quantize(Residual().eval(), fuse=True), tmp_path / "file")
    with pytest.raises(ocsquant.SchemaMismatchError, match="relu at 'act'"):
        ocsquant.load(Less().eval(), tmp_path / "file")
