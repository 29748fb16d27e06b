"""Checkpoints of sharded replicas: a part for each shard of each worker, for as many again or for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dlion import DistributedLion, DistributedMuon, last_complete_checkpoint, load_workers, save_workers
from hf_dlion.optim.gadamw import GlobalAdamW
from tests.harness import run_workers
from tests.optim.test_sharding import Parameters, cut, held, make_mesh, sharded

SHAPES = [(7, 3), (5,), (1, 4), (12, 2)]


def muon_and_adamw(params: list[Any], **options: Any) -> DistributedMuon:
    groups = [{"params": params[:1], "orthogonal": True}, {"params": params[1:]}]
    return DistributedMuon(groups, rest="average", **options)


METHODS: list[Any] = [DistributedLion, GlobalAdamW, muon_and_adamw]


def gradients(worker: int, step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * step + worker)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


class Run:
    """Workers that are sharded, or whole with one shard."""

    def __init__(self, rank: int, method: Any, workers: int, shards: int) -> None:
        self.mesh = make_mesh(workers, shards)
        self.worker = rank // shards
        whole = list(Parameters(SHAPES).parameters())
        self.params: list[Any] = sharded(self.mesh, SHAPES) if shards > 1 else whole
        self.optimizer = method(self.params, lr=0.1, process_group=self.mesh["dp_replicate"].get_group())
        self.sharded = shards > 1

    def train(self, steps: range) -> None:
        for step in steps:
            for parameter, gradient in zip(self.params, gradients(self.worker, step), strict=True):
                parameter.grad = cut(gradient, self.mesh) if self.sharded else gradient
            self.optimizer.step()

    def holds(self, wholes: list[Tensor], tensors: list[Tensor]) -> bool:
        return all(
            torch.equal(tensor, held(whole, self.mesh) if self.sharded else whole)
            for whole, tensor in zip(wholes, tensors, strict=True)
        )

    def states(self, name: str) -> list[Tensor]:
        states = [self.optimizer.state[parameter] for parameter in self.params]
        return [state[name] for state in states if name in state]

    def local_parameters(self) -> list[Tensor]:
        return [parameter.to_local() if self.sharded else parameter.detach() for parameter in self.params]


def write(rank: int, folder: str, workers: int, shards: int) -> list[dict[str, list[Tensor]]]:
    """Three steps, a checkpoint, and three more; resumed, they end with the same bits. Returns states of whole ones."""
    found: list[dict[str, list[Tensor]]] = []
    for method in METHODS:
        into = Path(folder, method.__name__, "checkpoint-3")
        if rank == 0:
            into.mkdir(parents=True)
        dist.barrier()
        run = Run(rank, method, workers, shards)
        run.train(range(3))
        save_workers(into, run.optimizer)
        values = [parameter.detach().clone() for parameter in run.params]
        run.train(range(3, 6))
        again = Run(rank, method, workers, shards)
        for parameter, value in zip(again.params, values, strict=True):
            parameter.data.copy_(value)
        load_workers(into, again.optimizer)
        if not run.sharded:
            found.append({name: [t.clone() for t in again.states(name)] for name in again.optimizer.state_names})
        again.train(range(3, 6))
        for name in run.optimizer.state_names:
            assert all(map(torch.equal, run.states(name), again.states(name)))
        assert all(map(torch.equal, run.local_parameters(), again.local_parameters()))
    return found


def take_over(rank: int, folder: str, workers: int, shards: int, policy: str, expected: list[Any]) -> None:
    for method, states in zip(METHODS, expected, strict=True):
        run = Run(rank, method, workers, shards)
        load_workers(Path(folder, method.__name__, "checkpoint-3"), run.optimizer, resume_world_size_policy=policy)
        for name in run.optimizer.state_names:
            by_worker = [state[name] for state in states]
            wholes = by_worker[run.worker if len(by_worker) == workers else 0]
            if len(by_worker) != workers and name in run.optimizer.local_state_names:
                wholes = [
                    sum(each) / len(each) if policy == "mean" else each[0] * 0 for each in zip(*by_worker, strict=True)
                ]
            assert run.holds(wholes, run.states(name)), f"{method.__name__} {name}"
        assert run.optimizer.param_groups[0]["step"] == 3


def test_shards_resume_and_are_dealt_out_anew(tmp_path: Path) -> None:
    whole = run_workers(write, 2, str(tmp_path / "whole"), 2, 1)
    expected = [list(states) for states in zip(*whole, strict=True)]
    run_workers(write, 4, str(tmp_path / "sharded"), 2, 2)
    names = sorted(path.name for path in (tmp_path / "sharded" / "DistributedLion" / "checkpoint-3").iterdir())
    assert names[1] == "worker_00000_of_00002_shard_00000_of_00002.safetensors"
    assert len(names) == 5
    for folder, workers, shards, policy in (
        ("sharded", 2, 3, "error"),
        ("sharded", 2, 1, "error"),
        ("whole", 2, 2, "error"),
        ("sharded", 1, 2, "mean"),
        ("sharded", 1, 3, "reset"),
    ):
        run_workers(take_over, workers * shards, str(tmp_path / folder), workers, shards, policy, expected)


def spoiled(rank: int, folder: str) -> tuple[str, str | None]:
    run = Run(rank, DistributedLion, 2, 2)
    into = Path(folder, "checkpoint-1")
    if rank == 0:
        into.mkdir()
    dist.barrier()
    save_workers(into, run.optimizer)
    whole = last_complete_checkpoint(folder)
    dist.barrier()
    if rank == 0:
        (into / "worker_00001_of_00002_shard_00000_of_00002.safetensors").unlink()
    dist.barrier()
    try:
        load_workers(into, run.optimizer)
    except RuntimeError as error:
        return str(error), whole
    return "nothing", whole


def test_a_missing_shard_is_named_on_every_rank(tmp_path: Path) -> None:
    for said, whole in run_workers(spoiled, 4, str(tmp_path)):
        assert whole == str(tmp_path / "checkpoint-1")
        assert said.startswith("rank 2 cannot resume: ")
        assert "worker_00001_of_00002_shard_00000_of_00002.safetensors is missing" in said
