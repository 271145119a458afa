"""transformers' Trainer, unchanged: the loss of a prepared model brings the penalty along."""

import copy

import pytest
import torch

from ocsquant import ops, qat

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

WEIGHT, ACCUMULATE, RATE = 0.05, 2, 0.5


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def data() -> list[dict[str, torch.Tensor]]:
    """Sequences of several lengths: padding does not count in the loss."""
    rows = []
    for i in range(2 * ACCUMULATE):
        ids = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[12 - i :] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def expected(model: torch.nn.Module) -> torch.Tensor:
    """One step of plain gradient descent on the explicit loss over the whole accumulated batch."""
    outputs: list[torch.Tensor] = []
    for layer in model.modules():
        if isinstance(layer, qat.QATLinear):
            layer.register_forward_hook(lambda module, args, y: outputs.append(y))
    rows = data()
    tokens = sum(int((row["labels"][1:] != -100).sum()) for row in rows)
    for i in range(0, len(rows), 2):
        outputs.clear()
        ids, labels = (torch.stack([row[key] for row in rows[i : i + 2]]) for key in ("input_ids", "labels"))
        logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / tokens
        share = int((labels[:, 1:] != -100).sum()) / tokens
        for y in outputs:
            loss = loss + share * WEIGHT * y.shape[-1] / 64 * ops.kurtosis(y).mean()
        loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(p.grad, alpha=RATE)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_step_of_the_trainer(tmp_path):
    model = network()
    config = qat.Config(clip_init=2.0, kurtosis_weight=WEIGHT, kurtosis_target=0.0)
    qat.prepare(model, config)
    again = copy.deepcopy(model)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=ACCUMULATE,
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        dataloader_num_workers=0,
        lr_scheduler_type="constant",
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(data())

    InOrder(model, arguments, train_dataset=data(), optimizers=(optimizer, None)).train()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    wanted = expected(again)
    assert (after - wanted).norm() <= 1e-5 * (wanted - before).norm()
    assert set(qat.kurtosis_report(model)) == {
        name for name, m in model.named_modules() if isinstance(m, qat.QATLinear)
    }


def test_a_plain_trainer_learns(tmp_path):
    model = qat.prepare(network(), calibration=[{"input_ids": data()[0]["input_ids"][None]}])
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=20, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    optimizer = torch.optim.AdamW(qat.param_groups(model, 1e-2, 0.0))
    trainer = transformers.Trainer(model, arguments, train_dataset=data(), optimizers=(optimizer, None))
    first = trainer.evaluate(data())["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data())["eval_loss"] < first - 0.3
