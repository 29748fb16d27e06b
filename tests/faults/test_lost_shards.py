"""A rank of a sharded replica dies: all others say which, those of other shards and replicas, too."""

from __future__ import annotations

import torch

from hf_dlion import DistributedMuon
from tests.faults.victims import check_survivors, die, needs_names
from tests.harness import run_to_their_ends
from tests.optim.test_sharding import cut, make_mesh, sharded

SHAPES = [(8, 6), (12, 6)]


def take_steps(rank: int, victim: int) -> None:
    mesh = make_mesh(2, 2)
    params = sharded(mesh, SHAPES)
    groups = [{"params": params, "orthogonal": True}]
    optimizer = DistributedMuon(groups, process_group=mesh["dp_replicate"].get_group())
    for step in range(5):
        generator = torch.Generator().manual_seed(10 * step + rank // 2)
        for parameter in params:
            parameter.grad = cut(torch.randn(parameter.shape, generator=generator), mesh)  # type: ignore[assignment]
        if rank == victim and step == 2:
            die()
        optimizer.step()


@needs_names
def test_a_lost_shard_is_named_by_all() -> None:
    check_survivors(run_to_their_ends(take_steps, 4, 1, timeout=100), 1)
