import copy
import json

import pytest
import torch
from torch import nn

import ocsquant


def test_every_layer_with_weights_is_listed_with_figures_or_a_reason():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 4), nn.LSTM(4, 8))
    ocsquant.quantize(model, ocsquant.Recipe(ocsquant.Weights(split=ocsquant.OCS(0.05))))
    report = ocsquant.report(model)
    layers = {layer.path: layer for layer in report.layers}
    assert set(layers) == {"0", "2", "3"}
    first = layers["0"]
    assert first.scheme == "W8A8"
    assert first.bytes_before == 4 * (64 * 128 + 128)
    assert first.bytes_after == sum(b.numel() * b.element_size() for b in model[0].buffers())
    assert 40 < first.sqnr < 60
    assert first.kernel == "quantized_linear"
    assert layers["2"].scheme == "float"
    assert layers["2"].reason
    total = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    assert report.total_after == total


def test_prints_a_table_and_exports_json():
    model = ocsquant.quantize(nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 2)))
    text = str(ocsquant.report(model))
    assert "quantized_linear" in text
    assert "too small" in text
    assert "smaller" in text
    data = json.loads(ocsquant.report(model).to_json())
    assert [row["path"] for row in data["layers"]] == ["0", "1"]
    assert data["layers"][0]["scheme"] == "W8A8"


def test_of_a_part_and_of_a_float_model():
    model = ocsquant.quantize(nn.Sequential(nn.Sequential(nn.Linear(128, 128))))
    assert ocsquant.report(model[0]).layers[0].path == "0"
    with pytest.raises(ocsquant.ArgumentError, match="model"):
        ocsquant.report(nn.Linear(3, 3))


def test_equivalence_of_a_split_network():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 50), nn.Linear(50, 20))
    model[3].weight.data[:, 7] *= 20
    split = ocsquant.quantize(
        copy.deepcopy(model),
        ocsquant.Recipe(ocsquant.Weights(bits=None, split=ocsquant.OCS(0.05)), None),
    )
    result = ocsquant.verify_equivalence(split, model, torch.randn(2, 3, 8, 8))
    assert result.holds
    assert set(result.layers) == {"0", "3", "4"}
    assert 0 <= result.largest < 1e-6
    assert "equal" in str(result)
    split[3].weight.data[0, 7] *= 1.01
    broken = ocsquant.verify_equivalence(split, model, torch.randn(2, 3, 8, 8))
    assert not broken.holds
    assert broken.layers["3"] > 1e-6
    assert broken.layers["4"] < 1e-6


def test_equivalence_names_what_does_not_correspond():
    model = nn.Sequential(nn.Linear(140, 40))
    with pytest.raises(ocsquant.ArgumentError, match="model"):
        ocsquant.verify_equivalence(model, model, torch.randn(1, 140))
    recipe = ocsquant.Recipe(ocsquant.Weights(bits=None, split=ocsquant.OCS(0.1)), None)
    split = ocsquant.quantize(nn.Sequential(nn.Linear(140, 40)), recipe)
    with pytest.raises(ocsquant.SchemaMismatchError, match="no linear or convolution '0'"):
        ocsquant.verify_equivalence(split, nn.Linear(140, 40), torch.randn(1, 140))


@pytest.mark.parametrize("shares", ["equal", "halving"])
@pytest.mark.parametrize("select", ["max", "gain"])
def test_equivalence_for_every_way_of_splitting(shares, select):
    recipe = ocsquant.Recipe(ocsquant.Weights(bits=None, split=ocsquant.OCS(0.1, shares=shares, select=select)), None)
    model = nn.Sequential(nn.Conv1d(8, 32, 3, padding=1, padding_mode="circular"), nn.Conv1d(32, 16, 1, bias=False))
    split = ocsquant.quantize(copy.deepcopy(model), recipe)
    assert ocsquant.verify_equivalence(split, model, torch.randn(2, 8, 20)).holds
