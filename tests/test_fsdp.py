"""FSDP2 over two processes: the penalty's gradient, and a state dict that goes out and comes back."""

import copy
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from penalized import cross_entropy, data, distance, explicit, network
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ocsquant import qat

WHOLE = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def _worker(rank: int, path: str, results) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (2,))
    whole = network("hinge")
    model = copy.deepcopy(whole)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    x, y = (t.chunk(2)[rank] for t in data())
    qat.with_kurtosis(model, cross_entropy(model(x), y)).backward()
    gradient = torch.cat([p.grad.full_tensor().flatten() for p in model.parameters()])

    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    state = get_model_state_dict(model, options=WHOLE)
    kept = {name: t.clone() for name, t in state.items()}  # setting it distributes what is in the mapping
    again = copy.deepcopy(whole)
    fully_shard(again, mesh=mesh)
    set_model_state_dict(again, state, options=WHOLE)
    expected, got = model(x), again(x)  # both ranks take part in each
    if rank == 0:
        plain = network("hinge")
        plain.load_state_dict(kept)
        results.put((gradient.numpy(), torch.equal(got, expected) and torch.equal(plain(x), expected)))
    dist.barrier()
    os._exit(0)  # past the end of gloo's threads, which now and then abort the process


def test_two_processes(tmp_path):
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    workers = [context.Process(target=_worker, args=(rank, str(tmp_path / "meet"), results)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    gradient, same = results.get()
    assert distance(torch.from_numpy(gradient), explicit("hinge", 2)) <= 1e-6
    assert same
