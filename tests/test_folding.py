"""BatchNorms folded into convolutions, in integers, in two steps, through a file."""

import copy

import pytest
import torch
from networks import Residual
from torch import nn

import ocsquant
from ocsquant.folding import FoldedBatchNorm
from ocsquant.nn import QuantizedConv


def test_a_residual_network_in_integers_and_through_a_file(tmp_path):
    model, x = Residual(), torch.randn(2, 3, 12, 12)
    model.stem[0].weight.requires_grad_(False)
    expected = model(x)
    q = ocsquant.quantize(copy.deepcopy(model), fold_batchnorm=True, overrides={"body": "W8A8", "last": "W8A8"})
    assert isinstance(q.stem[1], FoldedBatchNorm)
    assert isinstance(q.body[1], FoldedBatchNorm)
    assert isinstance(q.body[0], QuantizedConv)
    assert type(q.stem[0]) is nn.Conv2d
    assert not q.stem[0].bias.requires_grad
    with torch.no_grad():
        y = q(x)
    assert (y - expected).norm() < 0.02 * expected.norm()
    ocsquant.save(q, tmp_path / "file")
    with torch.device("meta"):
        empty = Residual()
    for twin in (model, empty, copy.deepcopy(q)):
        again = ocsquant.load(twin, tmp_path / "file")
        assert isinstance(again.stem[1], FoldedBatchNorm)
        with torch.no_grad():
            assert torch.equal(again(x), y)
        ocsquant.save(again, tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    other = Residual()
    other.stem[1] = nn.Linear(2, 2)
    with pytest.raises(ocsquant.SchemaMismatchError, match=r"stem\.1"):
        ocsquant.load(other, tmp_path / "file")


def test_folded_first_and_quantized_later(tmp_path):
    model, x = Residual(), torch.randn(2, 3, 12, 12)
    q = ocsquant.quantize(copy.deepcopy(model), fold_batchnorm=True, overrides={"last": "W8A8"}, ignore=["body"])
    ocsquant.quantize(q, overrides={"body.0": "W8A8", "stem.0": "W8A8"})
    assert isinstance(q.stem[0], QuantizedConv)
    ocsquant.save(q, tmp_path / "file")
    again = ocsquant.load(model, tmp_path / "file")
    assert torch.equal(again(x), q(x))


def test_what_does_not_compute_as_its_class_does_is_not_folded():
    model = nn.Sequential(nn.Conv2d(3, 96, 3), nn.BatchNorm2d(96)).eval()
    model[1].forward = lambda x: x * 0 + 1
    ocsquant.quantize(model, simulate=True, fold_batchnorm=True)
    assert type(model[1]) is nn.BatchNorm2d


READS = ["operator", "in place", "view", "kept", "norm twice", "conv twice", "given back", "given back unseen"]
READS += ["attribute", "weight", "forward"]


class Blocks(nn.Module):
    """Pairs as networks write them: by name, in a forward of their own; `read` says what else the forward does."""

    def __init__(self, read=None):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 64, 3, bias=False), nn.BatchNorm2d(64)
        self.second, self.other = nn.Conv2d(64, 64, 1), nn.BatchNorm2d(64)
        self.read, self.kept = read, None
        for norm in (self.norm, self.other):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        self.eval()

    def forward(self, x):
        y = self.first(x)
        extra = 0
        if self.read == "operator":
            extra = y.mean()
        elif self.read == "in place":
            y.relu_()
        elif self.read == "view":
            extra = y.view(-1)[0]
        elif self.read == "kept":
            self.kept = y
        elif self.read == "norm twice":
            self.norm(y)
        elif self.read == "conv twice":
            self.first(x + 1)
        z = torch.relu(self.norm(y)) + extra
        z = self.other(self.second(z))
        if self.read == "given back":
            return z, {"features": [y]}
        if self.read == "given back unseen":
            return Unseen((z, y))
        if self.read == "attribute":
            z.features = y
        if self.read == "weight":
            return z + nn.functional.conv2d(x, self.first.weight).mean()
        if self.read == "forward":
            return z + self.first.forward(x + 1).mean()
        return z + x.to(self.norm.weight.dtype).mean() if self.read == "dtype" else z


class Unseen:
    def __init__(self, value):
        self.value = value


def folded(model):
    return [name for name, module in model.named_modules() if isinstance(module, FoldedBatchNorm)]


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: {"x": x}])
def test_a_batch_shows_which_batchnorms_follow_a_convolution(form):
    model, x = Blocks(), torch.randn(2, 3, 9, 9)
    expected, state = model(x), torch.get_rng_state()
    ocsquant.quantize(model, simulate=True, overrides={"second": "W8A8"}, fold_batchnorm=form(x))
    assert torch.equal(torch.get_rng_state(), state)
    assert folded(model) == ["norm", "other"]
    assert (model(x) - expected).norm() < 0.02 * expected.norm()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    reasons = {line.path: line.reason for line in ocsquant.report(model).layers}
    assert reasons["norm"] == "folded into the convolution"


@pytest.mark.parametrize("read", READS)
def test_what_something_else_reads_stays(read):
    model, x = Blocks(read), torch.randn(2, 3, 9, 9)
    ocsquant.quantize(model, simulate=True, fold_batchnorm=x)
    assert folded(model) == ["other"]


class Taps(nn.Sequential):
    """Gives what its first convolution gives, too."""

    def forward(self, x):
        taps = []
        for layer in self:
            x = layer(x)
            taps.append(x)
        return x, taps[0]


def test_a_sequential_that_is_read_inside_stays():
    model, x = Taps(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.Conv2d(64, 64, 1)).eval(), torch.randn(2, 3, 9, 9)
    for how in (True, x):
        ocsquant.quantize(model, simulate=True, overrides={"2": "W8A8"}, fold_batchnorm=how)
        assert folded(model) == []


def test_a_sample_without_its_batch_stays():
    model, x = nn.Sequential(nn.Conv1d(64, 64, 1), nn.BatchNorm1d(64)).eval(), torch.randn(64, 64)
    ocsquant.quantize(model, simulate=True, overrides={"0": "W8A8"}, fold_batchnorm=x)
    assert folded(model) == []


def test_a_model_that_needs_its_batchnorms_is_refused_and_stays():
    model, x = Blocks("dtype"), torch.randn(2, 3, 9, 9)
    with pytest.raises(ocsquant.ArgumentError, match="fold_batchnorm must be a model that runs without"):
        ocsquant.quantize(model, simulate=True, fold_batchnorm=x)
    assert type(model.norm) is nn.BatchNorm2d
    assert not folded(model)


def test_half_precision_is_folded_in_float32():
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64, eps=1e-8)).eval()
    with torch.no_grad():
        model[0].weight[0], model[0].bias[0], model[1].running_var[0] = 0, 0, 0
    model, x = model.half(), torch.randn(2, 3, 9, 9).half()
    ocsquant.quantize(model, "W8A16", simulate=True, fold_batchnorm=x)
    assert folded(model) == ["1"]
    assert model(x).isfinite().all()


def test_hooks_training_and_shared_modules_stay():
    x = torch.randn(2, 3, 9, 9)
    hooked, training, shared = Blocks(), Blocks(), Blocks()
    hooked.first.register_forward_hook(lambda module, args, output: None)
    training.norm.train()
    shared.again = shared.norm
    for model in (hooked, training, shared):
        ocsquant.quantize(model, simulate=True, fold_batchnorm=x)
        assert folded(model) == ["other"]


def test_a_model_that_fails_on_the_batch_stays_as_it_is():
    model = Blocks()
    with pytest.raises(RuntimeError, match="channels"):
        ocsquant.quantize(model, simulate=True, fold_batchnorm=torch.randn(2, 5, 9, 9))
    assert type(model.norm) is nn.BatchNorm2d
    assert not model.first._forward_hooks
    assert not model.training
