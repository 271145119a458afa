"""Convolutions that add a residual before the nonlinearity they compute: what proves it, and what else may come."""

import copy

import pytest
import torch
from torch import nn

import ocsquant
from ocsquant.nn import FusedNonlinearity
from ocsquant.nn.sums import LATER, NEXT, PendingSum
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


class InLoop(Residual):
    def forward(self, x):
        for _ in range(2):
            h = self.conv(x)
            if x.shape[0] > 5:
                break
            h += x
            x = self.act(h)
        return x


class LeavesBefore(Residual):
    def forward(self, x):
        h = self.conv(x)
        if x.shape[0] > 5:
            return h
        h += x
        return self.act(h)


class SeenFinally(Residual):
    def forward(self, x):
        try:
            h = self.conv(x)
            h += x
            return self.act(h)
        finally:
            self.seen = h.clone()


class SeenInside(Residual):
    def forward(self, x):
        seen = lambda: h  # noqa: E731
        h = self.conv(x)
        y = seen()
        h += x
        return self.act(h) + y


class Global(Residual):
    def forward(self, x):
        global h  # noqa: PLW0603
        h = self.conv(x)
        h += x
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


class WidenedInPlace(Residual):
    def forward(self, x):
        h = self.conv(x)
        h += x.double()
        return self.act(h)


# The convolution that adds, and whether code runs before the addition.
PROVEN = {
    Residual: ("conv", False),
    Reversed: ("conv", False),
    TwoConvolutions: ("conv", True),
    Statements: ("conv", True),
    Sum: ("conv", True),
    InTheCall: ("conv", True),
    Scaled: ("conv", False),
    Broadcast: ("conv", True),
    Widened: ("conv", True),
    WidenedInPlace: ("conv", True),
}
OPEN = [Between, After, AddedTwice, ToItself, Less, ReadLater, InLoop, LeavesBefore, SeenFinally, SeenInside, Global]


def quantize(model, **options):
    """By name: also what would not gain on this CPU."""
    return ocsquant.quantize(model, overrides={"*": "W8A8"}, **options)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("cls", PROVEN)
def test_a_proven_sum_is_the_convolutions(cls, layout, tmp_path):
    torch.manual_seed(0)
    name, later = PROVEN[cls]
    assert sums(cls()) == {name: ("act", 1, later)}
    model = cls().eval().to(memory_format=layout)
    x = torch.randn(2, 64, 7, 6).contiguous(memory_format=layout)
    plain, made = quantize(copy.deepcopy(model)), quantize(copy.deepcopy(model), fuse=x)
    assert [n for n, m in made.named_modules() if getattr(m, "adds", None) is not None] == [name]
    assert getattr(made, name).adds == (LATER if later else NEXT)
    assert "computes the sum and the relu" in str(ocsquant.report(made))
    with torch.no_grad():
        assert isinstance(getattr(made, name)(x), PendingSum)
        y = made(x)
        assert torch.equal(y, plain(x))
        for given in (x.bfloat16(), x[:1], x[0]) if cls is not Broadcast else (x[:1],):
            assert torch.equal(made(given), plain(given))
            assert made(given).dtype == plain(given).dtype
        ocsquant.save(made, tmp_path / "file")
        for again in (ocsquant.load(cls().eval(), tmp_path / "file"), copy.deepcopy(made)):
            assert getattr(again, name).adds == getattr(made, name).adds
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
    assert made.conv.adds is None
    assert not any(isinstance(m, FusedNonlinearity) for m in made.modules())


def test_the_one_that_is_written_into_may_be_the_convolutions():
    assert sums(Into()) == {"other": ("act", 1, True)}


def test_other_readers_get_the_convolutions_output():
    torch.manual_seed(0)
    x = torch.randn(2, 64, 7, 6)
    made = quantize(Residual().eval(), fuse=True)
    plain = made.conv(x).detach()  # with gradients enabled
    with torch.no_grad():
        assert torch.equal(torch.sub(made.conv(x), 1), plain - 1)
        assert torch.equal(torch.cat([made.conv(x), plain]), torch.cat([plain, plain]))
        assert torch.equal(torch.add(made.conv(x), x, alpha=2), plain + 2 * x)
        assert torch.equal(torch.add(x, made.conv(x)), x + plain)
        assert torch.equal(x + made.conv(x), torch.relu(x + plain))
        assert torch.equal(made.conv(x) + made.conv(x), torch.relu(plain + plain))
        assert torch.equal(2 * made.conv(x), 2 * plain)
        assert torch.equal(-made.conv(x)[0], -plain[0])
        assert torch.equal(made.conv(x) > 0, plain > 0)
        assert len(made.conv(x)) == len(plain)
        assert made.conv(x).shape == plain.shape
        read = made.conv(x)
        assert read.mean() == plain.mean()
        assert torch.equal(read + x, torch.relu(plain + x))
        assert torch.equal(copy.copy(made.conv(x)) + x, torch.relu(plain + x))
        with pytest.raises(ocsquant.ArgumentError, match="fuse=False"):
            made.act(made.conv(x))


class ChangesInput(Residual):
    """What the convolution reads is another tensor when its output is added to."""

    def __init__(self):
        super().__init__()
        self.pre = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(self.conv(x) + self.pre(x))


class StoresIntoIt(Residual):
    def forward(self, x):
        h = self.conv(x)
        x[0] = 2.0
        h += x
        return self.act(h)


class NamesIt(Residual):
    def forward(self, x):
        h = self.conv(x)
        y = x
        h += y
        return self.act(h)


def test_giving_a_name_runs_no_code():
    assert sums(NamesIt()) == {"conv": ("act", 1, False)}


@pytest.mark.parametrize("cls", [ChangesInput, StoresIntoIt])
def test_an_input_that_changes_before_the_sum_is_refused(cls):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(2, 64, 7, 6)
    plain, made = quantize(copy.deepcopy(model)), quantize(copy.deepcopy(model), fuse=True)
    assert made.conv.adds == LATER
    with torch.no_grad(), pytest.raises(ocsquant.ArgumentError, match="changed before"):
        made(x.clone())
    with torch.inference_mode():  # where nobody could tell: the convolution does not wait
        assert torch.equal(made(x.clone()), plain(x.clone()))
    with pytest.raises(ocsquant.ArgumentError, match="changed before"):
        quantize(copy.deepcopy(model), fuse=x)


class Shared(nn.Module):
    """One ReLU, all of whose places are computed by convolutions."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 1), nn.ReLU()

    def forward(self, x):
        h = self.act(self.conv1(x))
        return self.act(self.conv2(h) + x)


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.more = base, nn.Conv2d(64, 64, 1)

    def forward(self, x):
        return self.base(x) + self.more(x)


def test_an_adapter_around_a_convolution_is_refused():
    made, x = quantize(Shared().eval(), fuse=True), torch.randn(2, 64, 7, 6)
    made.conv2 = Adapter(made.conv2)
    with torch.no_grad(), pytest.raises(ocsquant.ArgumentError, match="fuse=False"):
        made(x)


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
