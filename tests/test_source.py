"""What the code of a class proves about the calls of its children, and what it does not."""

import functools
import types

import pytest
import torch
from test_fusing import Nested, fused, models, sequential
from torch import nn

import ocsquant
from ocsquant.source import calls


class ReadTwice(Nested):
    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(self.act(h) + h)


class KeptBeside(Nested):
    def forward(self, x):
        h = self.fc1(x)
        y = self.act(h)
        return self.fc2(y + h)


class UsedAgain(Nested):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.act(x)


class SharedByName(Nested):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + getattr(self, "fc1")(x)[..., :64]  # noqa: B009


class WithArguments(Nested):
    def forward(self, x):
        return self.fc2(self.act(input=self.fc1(x)))


class Helper(Nested):
    def probe(self, x):
        return self.fc1(x)


def helper(module, x):
    return module.fc1(x)


def adding(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        return forward(self, x) + self.fc1(x)[..., :64]

    return wrapper


class Mixin:
    def probe(self, x):
        return self.fc1(x)[..., :64]


class Handed(Nested):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + helper(self, x)[..., :64]


class Decorated(Nested):
    @adding
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Mixed(nn.Module, Mixin):
    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.probe(x)


class Based(ReadTwice):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + ReadTwice.forward(self, x)


class Computed(Nested):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + getattr(self, f"fc{1}")(x)[..., :64]


class Listed(Nested):
    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + next(self.children())(x)[..., :64]


class Kept(Nested):
    def __init__(self):
        super().__init__()
        self.taps = (self.fc1,)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.taps[0](x)[..., :64]


class Closed(Nested):
    def __init__(self):
        super().__init__()
        self.probe = lambda x: self.fc1(x) + 0.0

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x))) + self.probe(x)[..., :64]


class Taken(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))

    def pre(self, x):
        return self[0](x)


UNPROVEN = [ReadTwice, KeptBeside, UsedAgain, SharedByName, WithArguments, Helper, Handed, Decorated, Mixed, Based]
UNPROVEN += [Computed, Listed, Kept, Closed, Taken]


@pytest.mark.parametrize("cls", UNPROVEN)
def test_what_is_not_proven_is_left(cls):
    _, plain, made = models(cls)
    assert fused(made) == []
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(made(x), plain(x))


class ParentReads(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Nested()

    def forward(self, x):
        return self.block(x) + self.block.fc1(x)[..., :64]


class TakesApart(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = sequential()

    def forward(self, x):
        for layer in self.mlp:
            x = layer(x)
        return x + self.mlp[:1](x)[..., :64]


@pytest.mark.parametrize("cls", [ParentReads, TakesApart])
def test_a_batch_shows_what_reads_past_the_holder(cls):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(3, 64)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ocsquant.ArgumentError, match="fuse must be False"):
        ocsquant.quantize(model, fuse=x)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert fused(ocsquant.quantize(model)) == []


def test_a_batch_lets_pass_what_is_right():
    for make, place in ((sequential, "1"), (Nested, "act")):
        model, x = make().train(), torch.randn(3, 64)
        assert fused(ocsquant.quantize(model, fuse={"input": x} if make is sequential else x)) == [place]
        assert model.training
    with pytest.raises(ocsquant.ArgumentTypeError, match="fuse must be True, False or a batch"):
        ocsquant.quantize(sequential(), fuse="yes")


def test_a_class_whose_forward_was_replaced_proves_nothing(monkeypatch):
    class Local(Nested):
        pass

    assert calls(Local())["fc1"] == ("act", True)
    monkeypatch.setattr(Nested, "forward", lambda self, x: self.fc1(x))
    assert calls(Local()) == {}
    monkeypatch.undo()
    made = type("Made", (nn.Module,), {"forward": eval("lambda self, x: self.act(self.fc1(x))")})
    assert calls(made()) == {}
    on_instance = Nested()
    on_instance.forward = functools.partial(Nested.forward, on_instance)
    assert fused(ocsquant.quantize(on_instance, fuse=True)) == []
    on_instance = Nested()
    on_instance.forward = types.MethodType(Nested.forward, on_instance)
    assert calls(on_instance) == {}


def test_a_file_is_loaded_where_the_code_proves_the_same(tmp_path):
    ocsquant.save(ocsquant.quantize(Nested().eval(), fuse=True), tmp_path / "file")
    with pytest.raises(ocsquant.SchemaMismatchError, match="gelu at 'act'"):
        ocsquant.load(ReadTwice(), tmp_path / "file")
