"""A loop of two replicas in two shards each, that resumes by itself; in a first attempt under torchrun, a rank dies."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_dlion import DistributedMuon, hidden_matrices, last_complete_checkpoint, load_workers, save_workers
from hf_dlion.bits.hashing import checksum
from hf_dlion.checkpoint import workers
from hf_dlion.optim.tensors import local
from tests.faults.victims import die

STEPS, SAVED = 8, 3  # steps between checkpoints


def train(rank: int, folder: str, dies: bool = False) -> int:
    """To the end; returns a checksum of what this rank holds."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3))
    fully_shard(model, mesh=mesh["dp_shard"])
    optimizer = DistributedMuon(hidden_matrices(model), lr=0.01, process_group=mesh["dp_replicate"].get_group())
    resumed, first = last_complete_checkpoint(folder), 0
    if resumed is not None:
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=resumed)
        set_model_state_dict(model, state["model"])
        load_workers(resumed, optimizer)
        first = optimizer.param_groups[0]["step"]
    record(rank, folder, resumed)
    for step in range(first, STEPS):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVED == 0:
            if dies and rank == 3 and step + 1 == 2 * SAVED:
                workers.entry_of = die  # type: ignore[assignment]  # when it has written its part
            into = Path(folder, f"checkpoint-{step + 1}")
            dcp.save({"model": get_model_state_dict(model)}, checkpoint_id=into)
            save_workers(into, optimizer)
    return checksum([local(parameter).detach() for parameter in model.parameters()])


def record(rank: int, folder: str, what: object) -> None:
    with Path(folder, f"rank{rank}.jsonl").open("a") as file:
        file.write(json.dumps(what) + "\n")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    end = train(dist.get_rank(), sys.argv[1], os.environ["TORCHELASTIC_RESTART_COUNT"] == "0")
    record(dist.get_rank(), sys.argv[1], end)
    dist.barrier()
    dist.destroy_process_group()
