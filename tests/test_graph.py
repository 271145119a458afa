"""What is concluded from the order of a model's modules: layouts of convolutions, BatchNorms folded into them."""

import copy

import pytest
import torch
from networks import Residual
from torch import nn
from torch.nn import functional as F

import ocsquant
from ocsquant.folding import FoldedBatchNorm
from ocsquant.graph import trace
from ocsquant.nn import QuantizedConv


class Ends(nn.Module):
    """A convolution whose output goes through `way`."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.other, self.way = nn.Conv2d(64, 64, 3, padding=1), nn.Conv2d(64, 64, 1), way

    def forward(self, x):
        return self.way(self, self.conv(x))


HIDDEN = {
    "another convolution": lambda m, x: m.other(x).contiguous(),
    "pooled and flattened": lambda m, x: torch.flatten(F.max_pool2d(x.relu(), 2), 1),
    "residual": lambda m, x: m.other(F.relu(x) + x).contiguous(),
    "reshaped": lambda m, x: x.reshape(x.size(0), -1),
    "mean": lambda m, x: x.mean((2, 3)),
}
SHOWN = {
    "returned": lambda m, x: x,
    "viewed": lambda m, x: x.view(x.shape[0], -1),
    "viewed after what hands it on": lambda m, x: F.relu(torch.cat([x, x], 1)).view(x.shape[0], -1),
    "on two ways": lambda m, x: (m.other(x).contiguous(), x.sigmoid()),
    "unknown": lambda m, x: torch.nn.functional.pixel_shuffle(x, 2),
}


@pytest.mark.parametrize("name", [*HIDDEN, *SHOWN])
def test_channels_last_only_where_the_model_cannot_tell(name):
    model = Ends(HIDDEN.get(name) or SHOWN[name]).eval()
    graph, problem = trace(model)
    assert graph is not None, problem
    assert graph.hides_layout(model.conv, {id(model.other)}) == (name in HIDDEN)
    x = torch.randn(2, 64, 6, 6)
    before = model(x)
    ocsquant.quantize(model, overrides={"conv": "W8A8", "other": "W8A8"})
    assert model.conv.channels_last is (name in HIDDEN)
    after = model(x)
    for a, b in zip(*(out if isinstance(out, tuple) else (out,) for out in (after, before)), strict=True):
        assert a.stride() == b.stride()
        assert (a - b).norm() < 0.03 * b.norm()


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.norm(self.conv(x)) if x.sum() > 0 else x


def test_what_cannot_be_traced_is_left_alone():
    model = Branches().eval()
    assert trace(model)[0] is None
    ocsquant.quantize(model, overrides={"conv": "W8A8"}, fold_batchnorm=True)
    assert model.calls == 0
    assert model.conv.channels_last is None
    assert isinstance(model.norm, nn.BatchNorm2d)
    assert any("cannot trace" in row.reason for row in ocsquant.report(model).layers)


def test_tracing_runs_a_twin_over_the_same_tensors():
    class Counts(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    model = Counts(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64)).eval()
    graph, _ = trace(model)
    assert graph is not None
    assert model.calls == 0
    assert graph.modules["0"] is model[0]


def test_batchnorms_of_a_residual_network(tmp_path):
    model = Residual()
    x = torch.randn(2, 3, 12, 12)
    expected = model(x)
    q = ocsquant.quantize(copy.deepcopy(model), fold_batchnorm=True)
    assert isinstance(q.bn1, FoldedBatchNorm)
    assert isinstance(q.bn2, FoldedBatchNorm)
    assert isinstance(q.body, QuantizedConv)
    assert q.body.channels_last is True
    assert q.last.channels_last is False
    assert type(q.stem) is nn.Conv2d
    assert q.stem(x).is_contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = q(x)
    assert (y - expected).norm() < 0.02 * expected.norm()
    ocsquant.save(q, tmp_path / "file")
    with torch.device("meta"):
        empty = Residual()
    for twin in (model, empty, copy.deepcopy(q)):
        again = ocsquant.load(twin, tmp_path / "file")
        assert isinstance(again.bn1, FoldedBatchNorm)
        with torch.no_grad():
            assert torch.equal(again(x), y)
        ocsquant.save(again, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    other = Residual()
    other.bn1 = nn.Linear(2, 2)
    with pytest.raises(ocsquant.SchemaMismatchError, match="bn1"):
        ocsquant.load(other, tmp_path / "file")


class Uses(nn.Module):
    def __init__(self, way):
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), way

    def forward(self, x):
        return self.way(self, x)


@pytest.mark.parametrize(
    "way",
    [
        lambda m, x: m.norm(m.conv(x)) + m.conv(x),
        lambda m, x: m.norm(m.conv(x)) + m.norm(x.new_zeros(64, 64, 1, 1)).mean(),
        lambda m, x: torch.add(*[f(y) for y in [m.conv(x)] for f in (m.norm, nn.Identity())]),
        lambda m, x: m.norm(m.conv(x).relu()),
    ],
    ids=["conv twice", "norm twice", "output twice", "something between"],
)
def test_batchnorms_that_are_not_the_only_use_stay(way):
    model, x = Uses(way).eval(), torch.randn(2, 3, 8, 8)
    model.norm.running_mean.normal_()
    expected = model(x)
    ocsquant.quantize(model, simulate=True, fold_batchnorm=True)
    assert type(model.norm) is nn.BatchNorm2d
    assert (model(x) - expected).norm() < 0.02 * expected.norm()
