import copy
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import ocsquant
from ocsquant import io as ocsquant_io


class Model(nn.Module):
    """Split, plain, tied, float, buffered and attention parts."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 128)
        self.first = nn.Linear(128, 128)
        self.attention = nn.MultiheadAttention(128, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(128, 4, 96, batch_first=True)
        self.norm = nn.BatchNorm1d(128)
        self.last = nn.Linear(128, 128, bias=False)
        self.head = nn.Linear(128, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.first(self.embed(ids))
        x = self.encoder(self.attention(x, x, x, need_weights=False)[0])
        return self.head(self.last(self.norm(x.transpose(1, 2)).transpose(1, 2)))


@pytest.fixture
def saved(tmp_path):
    model = Model().eval()
    recipe = ocsquant.Recipe(ocsquant.Weights(bits=6, split=ocsquant.OCS(0.05)))
    ocsquant.quantize(model, recipe, overrides={"last": "W8A8"}, ignore=["head"])
    path = tmp_path / "model.safetensors"
    ocsquant.save(model, path)
    return model, path


def state_bytes(model: nn.Module) -> dict[str, bytes]:
    return {k: v.flatten().view(torch.uint8).numpy().tobytes() for k, v in model.state_dict().items()}


def test_round_trip_is_bit_identical(saved):
    model, path = saved
    ids = torch.randint(0, 40, (2, 7))
    other = Model().eval()
    assert ocsquant.load(other, path) is other
    assert state_bytes(other) == state_bytes(model)
    with torch.inference_mode():
        assert torch.equal(other(ids), model(ids))
    assert other.head.weight is other.embed.weight
    assert str(ocsquant.report(other)) == str(ocsquant.report(model))


def test_from_the_meta_device(saved):
    model, path = saved
    with torch.device("meta"):
        other = Model().eval()
    ocsquant.load(other, path)
    assert not any(t.is_meta for t in (*other.parameters(), *other.buffers()))
    assert other.head.weight is other.embed.weight
    ids = torch.randint(0, 40, (2, 7))
    assert torch.equal(other(ids), model(ids))


def test_into_an_already_quantized_model_and_a_root_linear(tmp_path, saved):
    model, path = saved
    other = ocsquant.quantize(
        Model().eval(), ocsquant.Recipe(ocsquant.Weights(bits=6)), overrides={"last": "W8A8"}, ignore=["head"]
    )
    ocsquant.load(other, path)
    assert state_bytes(other) == state_bytes(model)
    linear = ocsquant.quantize(nn.Linear(128, 128))
    ocsquant.save(linear, tmp_path / "linear.safetensors")
    root = nn.Linear(128, 128)
    ocsquant.load(root, tmp_path / "linear.safetensors")
    assert torch.equal(root.packed, linear.packed)


def test_parameters_keep_their_identity(saved):
    _, path = saved
    other = Model().eval()
    before = id(other.embed.weight)
    ocsquant.load(other, path)
    assert id(other.embed.weight) == before


def rewrite(path, change):
    """Apply change(tensors, record) and write the file anew with a right digest and right checksums."""
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["ocsquant"])
        tensors = {k: file.get_tensor(k).clone() for k in file.keys()}  # noqa: SIM118
    record.pop("digest")
    change(tensors, record)
    record["sha256"] = {k: ocsquant_io._sha256(v) for k, v in tensors.items()}
    save_file(tensors, path, {"ocsquant": json.dumps(dict(record, digest=ocsquant_io._digest(record)))})


def index(tensors):
    return next(k for k in tensors if k.endswith("tail_index"))


SCALE, PACKED = "first.scale", "first.packed"
TAMPERED = {
    "scale zero": lambda t, r: t[SCALE].zero_(),
    "scale nan": lambda t, r: t[SCALE].fill_(torch.nan),
    "scale negative": lambda t, r: t[SCALE].neg_(),
    "index out of range": lambda t, r: t[index(t)].fill_(10**6),
    "index negative": lambda t, r: t[index(t)].sub_(100),
    "index not ascending": lambda t, r: t.__setitem__(index(t), t[index(t)].flip(0).contiguous()),
    "packed sums": lambda t, r: t[PACKED][:, -1].add_(1),
    "packed shape": lambda t, r: t.__setitem__(PACKED, t[PACKED][:, 1:].contiguous()),
    "packed dtype": lambda t, r: t.__setitem__(PACKED, t[PACKED].to(torch.int16)),
    "bias shape": lambda t, r: t.__setitem__("first.bias", t["first.bias"][:5].contiguous()),
    "tensor missing": lambda t, r: t.pop("norm.weight"),
    "tensor too many": lambda t, r: t.__setitem__("extra", torch.zeros(3)),
    "other shape": lambda t, r: t.__setitem__("norm.weight", torch.zeros(3)),
    "other dtype": lambda t, r: t.__setitem__("norm.weight", t["norm.weight"].half()),
    "scale missing": lambda t, r: t.pop(SCALE),
    "bits": lambda t, r: r["layers"]["first"].update(bits=99),
    "sizes": lambda t, r: r["layers"]["first"].update(in_features=-4),
    "activations": lambda t, r: r["layers"]["first"].update(activations=[8, 1000, 4.0]),
    "no such layer": lambda t, r: r["layers"].update(other=r["layers"].pop("first")),
    "attribute": lambda t, r: r["attributes"].append(["first", "forward", 0]),
    "attention": lambda t, r: r["attention"].append("first"),
    "alias": lambda t, r: r["aliases"].update(x="nothing"),
    "unknown entry": lambda t, r: r.update(more=1),
    "version": lambda t, r: r.update(version=ocsquant_io.VERSION + 1),
    "report": lambda t, r: r["report"].append({"nonsense": 1}),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tampered_files_are_refused_and_the_model_untouched(saved, name):
    _, path = saved
    rewrite(path, TAMPERED[name])
    other = Model().eval()
    before, classes = state_bytes(other), [type(m) for m in other.modules()]
    with pytest.raises(ocsquant.CheckpointError):
        ocsquant.load(other, path)
    assert state_bytes(other) == before
    assert [type(m) for m in other.modules()] == classes


def test_damaged_bytes_are_refused(saved):
    _, path = saved
    whole = path.read_bytes()
    for cut in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ocsquant.TruncatedCheckpointError):
            ocsquant.load(Model(), path)
    header = 8 + int.from_bytes(whole[:8], "little")
    for at in range(header, len(whole), max(1, (len(whole) - header) // 40)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ocsquant.CorruptCheckpointError):
            ocsquant.load(Model(), path)
    place = whole.index(b"W6A8") if b"W6A8" in whole else whole.index(b"activation_bits")
    path.write_bytes(whole[:place] + b"X" + whole[place + 1 :])
    with pytest.raises(ocsquant.CheckpointError):
        ocsquant.load(Model(), path)


def test_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        ocsquant.load(Model(), tmp_path / "nothing")
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(ocsquant.UnsupportedVersionError, match="not written by"):
        ocsquant.load(Model(), tmp_path / "plain.safetensors")


def test_saving_over_a_file_keeps_the_old_one_if_it_fails(saved, monkeypatch):
    model, path = saved
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(ocsquant_io.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        ocsquant.save(model, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(ocsquant.ArgumentError, match="quantized layers"):
        ocsquant.save(nn.Linear(140, 40), tmp_path / "x")
    simulated = ocsquant.quantize(nn.Linear(128, 128), simulate=True)
    with pytest.raises(ocsquant.UnsupportedModuleError, match="simulated"):
        ocsquant.save(simulated, tmp_path / "x")


def test_save_over_the_file_that_was_loaded(saved):
    model, path = saved
    other = ocsquant.load(Model().eval(), path)
    ocsquant.save(other, path)
    third = ocsquant.load(Model().eval(), path)
    assert state_bytes(third) == state_bytes(copy.deepcopy(model))
