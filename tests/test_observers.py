import multiprocessing
import os
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from networks import snapshot
from torch import distributed, nn

import ocsquant
from ocsquant import ArgumentError, ArgumentTypeError, NonFiniteError, NotCalibratedError, PerChannelStatic, Recipe
from ocsquant.observers import SAMPLE, InputStatistics


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64))
        self.unused = nn.Linear(64, 64)

    def forward(self, image, scale=1.0):
        return self.body(self.conv(image).mean((2, 3)) * scale)


def images(count: int, batch: int = 4) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 3, 8, 8, generator=g) for _ in range(count)]


def test_statistics_are_those_of_all_the_inputs():
    model = nn.Sequential(nn.Linear(6, 5))
    batches = [torch.randn(7, 3, 6) * 3 for _ in range(9)]
    with ocsquant.calibrate(model) as statistics:
        for batch in batches:
            model(batch)
    x = torch.cat(batches).reshape(-1, 6)
    seen = statistics["0"]
    assert seen.count == x.shape[0]
    assert torch.equal(seen.minimum, x.amin(0))
    assert torch.equal(seen.maximum, x.amax(0))
    assert torch.equal(seen.absmax, x.abs().amax(0))
    assert torch.allclose(seen.mean, x.mean(0), atol=1e-5)
    assert torch.allclose(seen.second_moment, x.square().mean(0))
    assert torch.equal(seen.sample, x[:: seen.stride])
    assert SAMPLE / 2 < seen.sample.shape[0] <= SAMPLE
    for half in range(2):
        part = seen.sample[seen.half == half]
        assert part.shape[0] > SAMPLE / 5
        assert (part >= seen.low[half]).all()
        assert (part <= seen.high[half]).all()


def test_a_convolution_is_seen_pixel_by_pixel_and_what_is_not_reached_is_missing():
    model = Net()
    with ocsquant.calibrate(model) as statistics:
        for image in images(2):
            model(image)
    assert set(statistics) == {"conv", "body.0", "body.2"}
    assert statistics["conv"].count == 2 * 4 * 64
    assert statistics["conv"].minimum.shape == (3,)


def test_hooks_go_even_after_an_error():
    model = Net()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError), ocsquant.calibrate(model):
        raise ZeroDivisionError
    with pytest.raises(NotCalibratedError, match="none of the 4 float layers"), ocsquant.calibrate(model):
        pass
    assert snapshot(model) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_an_input_that_is_not_finite_is_refused_by_name():
    model = Net()
    image = images(1)[0]
    image[1, 2, 3, 4] = torch.inf
    with pytest.raises(NonFiniteError, match="the input of conv"), ocsquant.calibrate(model):
        model(image)


def test_batches_of_every_structure_and_the_mode_of_the_model():
    recipe = Recipe(activations=PerChannelStatic(), overrides={"unused": "W8A8"})
    image = images(1)[0]
    results = []
    for batch in (image, (image, 1.0), [image], {"image": image, "scale": 1.0}):
        model = Net().train()
        model.load_state_dict(REFERENCE.state_dict())
        model.conv.eval()
        quantized = ocsquant.quantize(model, recipe, calibration=iter([batch]))
        assert model.training
        assert not model.conv.training
        results.append(quantized(image))
    assert all(torch.equal(r, results[0]) for r in results)


REFERENCE = Net()


def test_statistics_merge_as_if_seen_together():
    model = Net()
    every = images(6)
    with ocsquant.calibrate(model) as whole:
        for image in every:
            model(image)
    parts = []
    for half in (every[:2], every[2:]):
        with ocsquant.calibrate(model) as part:
            for image in half:
                model(image)
        parts.append(part)
    together = parts[0].merge(parts[1])
    assert set(together) == set(whole)
    for path, seen in together.items():
        assert seen.count == whole[path].count
        assert torch.equal(seen.minimum, whole[path].minimum)
        assert torch.allclose(seen.squares, whole[path].squares)
        assert seen.sample.shape[0] <= SAMPLE
    wrong = ocsquant.Statistics({"conv": InputStatistics.empty(5)})
    with pytest.raises(ArgumentError, match="'conv' has 3 channels, got 5"):
        together.merge(wrong)


def test_a_merged_sample_holds_each_part_by_its_tokens():
    parts = []
    for i, tokens in enumerate((1000, 1000, 1000, 1000, 250)):
        part = InputStatistics.empty(3)
        part.add(torch.full((tokens, 3), float(i)))
        parts.append(part)
    together = parts[0]
    for part in parts[1:]:
        together = together.merged(part)
    shares = [int((together.sample[:, 0] == i).sum()) for i in range(5)]
    assert max(shares[:4]) - min(shares[:4]) <= 1
    assert abs(shares[4] - shares[0] / 4) <= 1
    assert sum(shares) * together.stride > 4000


def test_inference_mode_threads_and_other_defaults():
    model = nn.Sequential(nn.Linear(6, 5))
    with ocsquant.calibrate(model) as statistics:
        with torch.inference_mode():
            model(torch.randn(4, 6))
        model(torch.randn(4, 6))
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(model, [torch.randn(7, 6) for _ in range(40)]))
    seen = statistics["0"]
    assert seen.count == 8 + 280
    assert seen.sample.shape[0] == seen.half.shape[0]
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert InputStatistics.empty(3).low.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


def test_save_and_load(tmp_path):
    model = Net()
    with ocsquant.calibrate(model) as statistics:
        model(images(1)[0])
    statistics.save(tmp_path / "seen")
    again = ocsquant.Statistics.load(tmp_path / "seen")
    assert list(again) == list(statistics)
    for path, seen in again.items():
        for name in ("count", "stride", "calls"):
            assert getattr(seen, name) == getattr(statistics[path], name)
        for name in ("low", "high", "total", "squares", "sample", "half"):
            assert torch.equal(getattr(seen, name), getattr(statistics[path], name))
    ocsquant.save(ocsquant.quantize(nn.Sequential(nn.Linear(128, 64))), tmp_path / "model")
    with pytest.raises(ocsquant.CorruptCheckpointError, match="no statistics"):
        ocsquant.Statistics.load(tmp_path / "model")


def reduce_in_one_process(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = Net()
    with ocsquant.calibrate(model) as statistics:
        for image in images(4)[rank::2]:
            model(image)
    statistics.all_reduce().save(f"{folder}/{rank}")
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_available(), reason="this torch has no torch.distributed")
def test_all_reduce_over_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=reduce_in_one_process, args=(r, port, str(tmp_path))) for r in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    first, second = (ocsquant.Statistics.load(tmp_path / str(r)) for r in range(2))
    torch.manual_seed(0)
    model = Net()
    with ocsquant.calibrate(model) as whole:
        for image in images(4):
            model(image)
    for path, seen in first.items():
        assert seen.count == whole[path].count
        assert torch.equal(seen.maximum, whole[path].maximum)
        assert torch.allclose(seen.total, whole[path].total)
        assert torch.equal(seen.sample, second[path].sample)
        assert torch.equal(seen.squares, second[path].squares)


RECIPE = Recipe(activations=PerChannelStatic())


@pytest.mark.parametrize(
    ("calibration", "error", "text"),
    [
        (None, NotCalibratedError, "calibration must be .* the first is 'body.0'"),
        ([], ArgumentError, "at least one batch, got an empty one"),
        (images(1), NotCalibratedError, "reached none of these layers: unused"),
        (torch.zeros(4, 3, 8, 8), ArgumentTypeError, "calibration"),
        ({"image": images(1)[0]}, ArgumentTypeError, "calibration"),
        (ocsquant.Statistics({"other": InputStatistics.empty(3)}), ArgumentError, "of this model's layers"),
        (ocsquant.Statistics({"body.0": InputStatistics.empty(9)}), ArgumentError, "'body.0' has 8 channels, got 9"),
    ],
)
def test_what_calibration_cannot_be(calibration, error, text):
    model = Net()
    before = snapshot(model)
    with pytest.raises(error, match=text):
        ocsquant.quantize(model, RECIPE, calibration=calibration, overrides={"body.*": RECIPE, "unused": RECIPE})
    assert snapshot(model) == before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_batch_that_fails_leaves_the_model_as_it_was():
    model = Net().train()
    before = snapshot(model)
    with pytest.raises(RuntimeError):
        ocsquant.quantize(model, RECIPE, calibration=[images(1)[0], torch.zeros(1)])
    assert snapshot(model) == before
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
