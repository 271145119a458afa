"""Convolutions that compute the nonlinearity behind them and behind the BatchNorm they have taken over."""

import copy
import pickle

import pytest
import torch
from torch import nn

import ocsquant
from ocsquant import PerTensorStatic, Recipe
from ocsquant.nn import FusedNonlinearity
from ocsquant.source import calls, sums


class Block(nn.Module):
    """A residual block as torchvision writes it: one ReLU for three places."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(128, 64, 1, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.bn2 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.bn3 = nn.Conv2d(64, 128, 1, bias=False), nn.BatchNorm2d(128)
        self.relu = nn.ReLU(inplace=True)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


class ReadBetween(Block):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return self.conv3(self.relu(out)) + self.conv3(out)


class GeluElsewhere(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(128, 128, 3, padding=1), nn.GELU()

    def forward(self, x):
        return self.act(self.conv(x)) + self.act(x)


def quantize(model, recipe="W8A8", **options):
    """By name: also what would not gain on this CPU."""
    return ocsquant.quantize(model, overrides={"*": recipe}, **options)


def sequential():
    made = nn.Sequential(
        nn.Conv2d(128, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 1), nn.SiLU(), nn.Flatten()
    )
    made[1].running_mean.normal_()
    return made


def places(model):
    return {
        path: (m.layers, m.called_elsewhere) for path, m in model.named_modules() if isinstance(m, FusedNonlinearity)
    }


CASES = {"block": (Block, {"relu": (3, False)}), "sequential": (sequential, {"2": (1, False), "4": (1, False)})}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("recipe", ["W8A8", Recipe(activations=PerTensorStatic())])
@pytest.mark.parametrize("name", CASES)
def test_proven_patterns_are_fused(name, recipe, layout, tmp_path):
    make, expected_places = CASES[name]
    torch.manual_seed(0)
    model = make().eval().to(memory_format=layout)
    x = torch.randn(2, 128, 7, 6).contiguous(memory_format=layout)
    options = {"fold_batchnorm": x, "calibration": [x]}
    plain = quantize(copy.deepcopy(model), recipe, **options)
    made = quantize(copy.deepcopy(model), recipe, **options, fuse=x)
    assert places(plain) == {}
    assert places(made) == expected_places
    noted = [line for line in ocsquant.report(made).layers if "that follows" in line.reason]
    assert len(noted) == sum(count for count, _ in expected_places.values())
    with torch.no_grad():
        y = made(x)
        # A ReLU rounds nothing; SiLU's last bit may be another.
        close = {"rtol": 0, "atol": 0} if name == "block" else {}
        torch.testing.assert_close(y, plain(x), **close)
        with torch.inference_mode():
            assert torch.equal(made(x), y)
        ocsquant.save(made, tmp_path / "file")
        loaded = ocsquant.load(make().eval(), tmp_path / "file")
        assert places(loaded) == expected_places
        for again in (loaded, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            assert torch.equal(again(x), y)
        torch.compiler.reset()
        torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), y)
        torch.testing.assert_close(torch.export.export(made, (x,)).module()(x), y)
    assert torch.equal(made(x), plain(x))  # with gradients: the same operations
    torch.testing.assert_close(made(x.bfloat16()), plain(x.bfloat16()))


def test_what_is_read_between_is_not_fused():
    x = torch.randn(2, 128, 7, 6)
    for make in (ReadBetween, GeluElsewhere):
        assert places(quantize(make().eval(), fuse=True)) == {}
    made = quantize(Block().eval(), fuse=True)  # its BatchNorms are there
    assert places(made) == {}
    assert made(x).isfinite().all()


class InPlaceElsewhere(Block):
    def forward(self, x):
        h = self.conv2(self.relu(self.conv1(x)))
        h = self.conv3(h) + x
        self.relu(h)  # changes h
        return h


class Preactivation(Block):
    def forward(self, x):
        h = self.relu(x)  # changes x
        h = self.relu(self.conv1(h))
        return self.conv3(h) + x


class CalledTwice(Block):
    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.relu(self.conv1(x))
        k = self.relu(h)
        k += 1
        return h + k


class AsksIt(Block):
    def forward(self, x):
        h = self.relu(self.conv1(x))
        return self.conv3(h * 1 if self.relu.inplace else h)


@pytest.mark.parametrize("cls", [InPlaceElsewhere, Preactivation, CalledTwice, AsksIt])
@pytest.mark.parametrize("batch", [False, True])
@torch.no_grad()
def test_what_a_relu_does_elsewhere_it_goes_on_doing(cls, batch):
    torch.manual_seed(0)
    model, x = cls().eval(), torch.randn(2, 128, 7, 6)
    plain = quantize(copy.deepcopy(model))
    made = quantize(copy.deepcopy(model), fuse=x.clone() if batch else True)
    assert places(made) == ({} if cls is AsksIt else {"relu": (1, True)})
    one, other = x.clone(), x.clone()
    assert torch.equal(made(one), plain(other))
    assert torch.equal(one, other)
    torch.compiler.reset()
    assert torch.equal(torch.compile(made, fullgraph=True, backend="aot_eager")(x.clone()), plain(x.clone()))


def test_fusing_in_two_calls(tmp_path):
    x = torch.randn(2, 128, 7, 6)
    made = quantize(Block().eval(), ignore=["conv2"], fold_batchnorm=x, fuse=True)
    assert places(made) == {"relu": (2, True)}
    quantize(made, fuse=True)
    ocsquant.save(made, tmp_path / "file")
    with torch.no_grad():
        assert torch.equal(ocsquant.load(Block().eval(), tmp_path / "file")(x), made(x))


def test_a_file_wants_the_places_it_was_written_for(tmp_path):
    x = torch.randn(2, 128, 7, 6)
    ocsquant.save(quantize(Block().eval(), fold_batchnorm=x, fuse=True), tmp_path / "file")
    with pytest.raises(ocsquant.SchemaMismatchError, match="relu at 'relu'"):
        ocsquant.load(ReadBetween().eval(), tmp_path / "file")


def test_which_names_are_called_elsewhere():
    assert calls(Block())["conv1"] == ("bn1", 1)
    assert calls(Block())["bn2"] == ("relu", 3)
    assert "bn3" not in calls(Block())
    assert sums(Block()) == {"bn3": ("relu", 3, False)}


def test_a_hook_between_is_refused_or_seen():
    x = torch.randn(2, 128, 7, 6)
    made = quantize(sequential().eval(), fold_batchnorm=True, fuse=True)
    made[0].register_forward_hook(lambda module, args, y: y * 0.5)
    with torch.no_grad(), pytest.raises(ocsquant.ArgumentError, match="fuse=False"):
        made(x)
