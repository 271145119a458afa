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
