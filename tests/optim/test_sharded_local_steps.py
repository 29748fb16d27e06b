"""Local steps of replicas sharded by FSDP2: bit for bit those of whole replicas, from checkpoints, too."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_dlion import DistributedLion, DistributedMuon, LocalSteps, load_workers, save_workers
from hf_dlion.optim.gmuon import GlobalMuon
from tests.harness import run_workers
from tests.optim.test_sharding import Parameters, cut, held, make_mesh, sharded

# Blocks of 256 elements, which share a scale, begin alike in the whole and in its shards, of which some are empty.
SHAPES: list[tuple[int, ...]] = [(24, 64), (3, 256), (1, 256), (6, 2, 128), (5, 256)]
ROUND = 4


def muon(params: list[Any], lr: float) -> GlobalMuon:
    return GlobalMuon([{"params": [params[0], params[4]], "orthogonal": True}, {"params": params[1:4]}], lr)


CASES: list[tuple[Any, dict[str, Any]]] = [
    (torch.optim.AdamW, {"tie": "zero"}),
    (torch.optim.AdamW, {"aggregation": "mean"}),
    (partial(torch.optim.SGD, momentum=0.9), {"aggregation": "avg", "fragments": 2, "delay": 1, "nesterov": False}),
    (DistributedLion, {"tie": "zero", "exchange": "sharded"}),
    (muon, {"tie": "zero"}),
]


class Run:
    """Workers that are sharded, or whole with one shard."""

    def __init__(self, rank: int, workers: int, shards: int, inner: Any, options: dict[str, Any]) -> None:
        self.mesh, self.worker, self.sharded = make_mesh(workers, shards), rank // shards, shards > 1
        self.params: list[Any] = sharded(self.mesh, SHAPES) if shards > 1 else list(Parameters(SHAPES).parameters())
        group = self.mesh["dp_replicate"].get_group()
        self.optimizer = LocalSteps(inner(self.params, lr=0.01), every=ROUND, process_group=group, **options)

    def train(self, steps: range, bad: int | None = None) -> None:
        """Gradients by worker; in one step with a bad row, which is one shard's."""
        for step in steps:
            generator = torch.Generator().manual_seed(10 * step + self.worker)
            for index, parameter in enumerate(self.params):
                gradient = torch.randn(SHAPES[index], generator=generator)
                if step == bad and index == 0 and self.worker == 0:
                    gradient[0] = float("inf")
                parameter.grad = cut(gradient, self.mesh) if self.sharded else gradient
            self.optimizer.step()

    @property
    def parameters(self) -> list[Tensor]:
        return [p.to_local() if self.sharded else p.detach() for p in self.params]


def follow_whole_replicas(rank: int, workers: int, shards: int, cases: list[Any]) -> None:
    for inner, options in cases:
        ours = Run(rank, workers, shards, inner, options)
        group = ours.mesh["dp_replicate"].get_group()
        params = list(Parameters(SHAPES).parameters())
        theirs = copy.copy(ours)
        theirs.sharded, theirs.params = False, params
        theirs.optimizer = LocalSteps(inner(params, lr=0.01), every=ROUND, process_group=group, **options)
        for step in range(3 * ROUND):
            for one in (ours, theirs):
                one.train(range(step, step + 1), bad=5)
            same = [torch.equal(p, held(w, ours.mesh)) for p, w in zip(ours.parameters, params, strict=True)]
            assert all(same), f"{options} step {step}: {same}"
            if step == ROUND + 1:  # in the middle of a round
                state = ours.optimizer.state_dict()
                ours = Run(rank, workers, shards, inner, options)
                ours.optimizer.load_state_dict(state)
                theirs.optimizer.vote_shares()  # both count from here on
        if (shares := ours.optimizer.vote_shares()) is not None:
            whole = theirs.optimizer.vote_shares()
            assert whole is not None
            assert abs(shares.unanimous - whole.unanimous) < 2e-3


def test_shards_do_what_whole_replicas_do() -> None:
    run_workers(follow_whole_replicas, 4, 2, 2, CASES)
    run_workers(follow_whole_replicas, 6, 2, 3, [CASES[0], CASES[4]])


def a_muon_inside(rank: int) -> list[Tensor]:
    mesh = make_mesh(2, 2)
    params: list[Any] = sharded(mesh, SHAPES)
    groups = [{"params": [params[0], params[4]], "orthogonal": True}, {"params": params[1:4]}]
    inner = DistributedMuon(groups, lr=0.01)
    optimizer = LocalSteps(inner, every=2, process_group=mesh["dp_replicate"].get_group())
    for step in range(4):
        for index, parameter in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + 10 * index + rank // 2)
            parameter.grad = cut(torch.randn(SHAPES[index], generator=generator), mesh)
        optimizer.step()
    return [parameter.to_local().clone() for parameter in params]


def test_the_inner_optimizer_may_gather_matrices() -> None:
    found = run_workers(a_muon_inside, 4)
    for first, second in ((0, 2), (1, 3)):
        assert all(map(torch.equal, found[first], found[second]))
    assert not torch.equal(found[0][0], found[1][0])


def write(rank: int, folder: str) -> None:
    """Five steps, a checkpoint, seven more: resumed, they end with the same bits."""
    inner, options = CASES[0]
    run = Run(rank, 2, 2, inner, options)
    run.train(range(5))
    if rank == 0:
        Path(folder).mkdir()
    dist.barrier()
    save_workers(folder, run.optimizer)
    run.train(range(5, 12))
    again = Run(rank, 2, 2, inner, options)
    load_workers(folder, again.optimizer)
    again.train(range(5, 12))
    assert all(map(torch.equal, run.parameters, again.parameters))


def resume(rank: int, folder: str, shards: int, expected: str) -> None:
    run = Run(rank, 2, shards, *CASES[0])
    load_workers(folder, run.optimizer)
    run.train(range(5, 12))
    whole = torch.load(expected)
    for parameter, one in zip(run.parameters, whole, strict=True):
        assert torch.equal(parameter, held(one, run.mesh) if run.sharded else one)


def wholes(rank: int, expected: str) -> None:
    run = Run(rank, 2, 1, *CASES[0])
    run.train(range(12))
    if rank == 0:
        torch.save(run.parameters, expected)


def test_checkpoints_in_the_middle_of_a_round_are_dealt_out_anew(tmp_path: Path) -> None:
    folder, expected = str(tmp_path / "checkpoint"), str(tmp_path / "expected.pt")
    run_workers(wholes, 2, expected)
    run_workers(write, 4, folder)
    for shards in (1, 3):
        run_workers(resume, 2 * shards, folder, shards, expected)
