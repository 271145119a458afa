"""Smoke test of an installed wheel, without pytest: python tests/smoke.py (from any folder but the source tree's root).

Run it in a clean environment that has a torch (2.10 or later) and the wheel:
    pip install torch==2.10.0 && pip install dist/ocsquant-*.whl && cd / && python <checkout>/tests/smoke.py
"""

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import ocsquant
from ocsquant.methods.tokens import quantize_tokens


def main() -> None:
    print(ocsquant.env())
    assert Path(ocsquant.__file__).parents[1] != Path(__file__).resolve().parents[1], "the source tree, not a wheel"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 130), nn.GELU(), nn.Linear(130, 64)).eval()
    model[0].weight.data[:, 5] *= 20
    x = torch.randn(9, 96)
    x[:, 3] *= 30
    expected = model(x).detach()
    recipe = ocsquant.Recipe(ocsquant.Weights(split=ocsquant.OCS(0.05)))
    quantized = ocsquant.quantize(copy.deepcopy(model), recipe)
    print(ocsquant.report(quantized))
    y = quantized(x).detach()
    error = float((y - expected).norm() / expected.norm())
    assert error < 0.05, f"relative error {error}"
    layer = quantized[0]
    codes, step = quantize_tokens(x, 8, 16, 4.0)
    product = (codes.long() @ layer.codes.long().T).float()
    assert torch.equal(layer(x), product * (step[:, None] * layer.scale) + layer.bias), "not bit-exact"
    with tempfile.TemporaryDirectory() as folder:
        ocsquant.save(quantized, Path(folder) / "model.safetensors")
        loaded = ocsquant.load(copy.deepcopy(model), Path(folder) / "model.safetensors")
    assert torch.equal(loaded(x), y)
    with torch.no_grad():
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), y)
        program = torch.export.export(quantized, (x,))
        assert torch.equal(program.module()(x), y)
    leaf = x.clone().requires_grad_()
    quantized(leaf).sum().backward()
    assert leaf.grad is not None
    w, scale = torch.randn(4, 30, requires_grad=True), torch.full((4,), 0.1, requires_grad=True)
    ocsquant.ops.fake_quantize_split(w, scale, torch.ones(30, dtype=torch.int32), 4).sum().backward()
    assert w.grad is not None
    assert scale.grad is not None
    op = torch.ops.ocsquant.quantized_linear.default
    torch.library.opcheck(op, (x, layer.packed, layer.scale, layer.bias, layer.tail_index, 8, 16, 4.0))
    print("smoke test passed")


if __name__ == "__main__":
    main()
