"""Workers that come and go under torchft: over real processes, of which some are killed, and one comes later."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_dlion.optim import mean_gradient
from hf_dlion.optim.local_steps import LocalSteps
from hf_dlion.optim.virtual import VirtualWorkers
from tests.faults.elastic_training import BUCKET, EVERY, OPTIONS, inner, loss_of, small_model
from tests.faults.test_soak import environment

pytest.importorskip("torchft", reason="torchft, of which the process groups are, is not installed")

STEPS = 24
Votes = list[tuple[int, int, list[torch.Tensor]]]


@pytest.fixture
def lighthouse() -> Iterator[str]:
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(bind="127.0.0.1:0", min_replicas=1, join_timeout_ms=60_000, heartbeat_timeout_ms=3000)
    yield f"http://127.0.0.1:{server.address().rpartition(':')[2]}"
    server.shutdown()


def start(worker: int, folder: Path, lighthouse: str, **how: Any) -> subprocess.Popen[bytes]:
    given = {"worker": worker, "folder": str(folder), "steps": STEPS, "awaits": {}, "dies_in": -1, "dies_after": -1}
    command = [sys.executable, "-m", "tests.faults.elastic_training", json.dumps(given | how)]
    with (folder / f"log_{worker}.txt").open("wb") as log:
        return subprocess.Popen(command, env=environment() | {"TORCHFT_LIGHTHOUSE": lighthouse}, stdout=log, stderr=log)


def votes_of(worker: int, folder: Path) -> Votes:
    return torch.load(folder / f"votes_{worker}.pt", weights_only=True)


def as_virtual_workers(workers: int, steps: int) -> Votes:
    """The votes of as many that nothing happens to."""
    model = small_model(0)
    optimizer = VirtualWorkers(
        model.parameters(), workers, lambda given, **options: LocalSteps(inner(given), **options), **OPTIONS
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    votes: Votes = []
    for step in range(steps):
        for worker in range(workers):
            optimizer.zero_grad()
            loss_of(model, worker, step).backward()
            optimizer.next_worker()
        optimizer.step()
        scheduler.step()
        if (step + 1) % EVERY == 0:
            votes.append((step + 1, workers, [p.detach().clone() for p in model.parameters()]))
    return votes


def same(votes: Votes, others: Votes) -> None:
    assert [vote[:2] for vote in votes] == [vote[:2] for vote in others]
    for (step, _, ours), (_, _, theirs) in zip(votes, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), step


def test_others_go_on_where_workers_are_killed_and_one_comes(
    tmp_path: Path, lighthouse: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worker 2 is killed in the first vote, 3 comes to the third, and 0 is killed after the fourth."""
    there = {"0": [f"there_{worker}" for worker in range(3)], "9": ["there_3"]}
    late = {"": ["at_8"]}
    processes = [
        start(0, tmp_path, lighthouse, awaits=there, dies_after=18),
        start(1, tmp_path, lighthouse, awaits=there),
        start(2, tmp_path, lighthouse, awaits=there, dies_in=EVERY),
        start(3, tmp_path, lighthouse, awaits=late),
    ]
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((tmp_path / f"log_{worker}.txt").read_text() for worker in range(4))
    assert codes == [9, 0, 9, 0], logs
    first, second, fourth = (votes_of(worker, tmp_path) for worker in (0, 1, 3))
    assert [vote[:2] for vote in second] == [(0, 3), (4, 2), (8, 2), (12, 3), (16, 3), (20, 2), (24, 2)], logs
    monkeypatch.setattr(mean_gradient, "BUCKET", BUCKET)
    same(second[1:3], as_virtual_workers(2, 2 * EVERY))
    same(first, second[:5])
    same(fourth, second[3:])
    assert "is held again with the workers that are left" in logs


@pytest.mark.slow
def test_the_example_runs(tmp_path: Path, lighthouse: str) -> None:
    command = [sys.executable, "examples/elastic_loop.py", "--lighthouse", lighthouse, "--pause", "0"]
    workers = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(2)
    ]
    printed = [worker.communicate(timeout=200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], printed
    assert any("step 1200: loss 0.0" in one for one in printed), printed


def test_what_is_refused() -> None:
    from torchft.manager import WorldSizeMode

    from hf_dlion.integrations.torchft import ElasticLocalSteps

    def made(
        asynchronous: bool = False, backend: str = "torchft-gloo", mode: Any = WorldSizeMode.DYNAMIC, **options: Any
    ) -> ElasticLocalSteps:
        manager: Any = SimpleNamespace(
            _use_async_quorum=asynchronous, _replica_world_size_mode=mode, register_state_dict_fn=lambda *_: None
        )
        group: Any = SimpleNamespace(getBackendName=lambda: backend)
        parameter = torch.nn.Parameter(torch.ones(3))
        parameter.grad = torch.ones(3)
        return ElasticLocalSteps(torch.optim.SGD([parameter]), manager, group, **{"every": 4} | options)

    with pytest.raises(ValueError, match="use_async_quorum=True.*Make it with use_async_quorum=False"):
        made(asynchronous=True)
    with pytest.raises(ValueError, match="delay of LocalSteps is not for workers that come and go. Leave it out"):
        made(delay=2)
    with pytest.raises(ValueError, match="'hierarchical' is not for workers that come and go"):
        made(exchange="hierarchical")
    with pytest.raises(ValueError, match="fixed number of workers, and spares"):
        made(mode=WorldSizeMode.FIXED_WITH_SPARES)
    with pytest.raises(ValueError, match="the group is torchft-nccl.*Make it a torchft.process_group.ProcessGroupGloo"):
        made(backend="torchft-nccl")
    with pytest.raises(RuntimeError, match="has not joined the others. Call join"):
        made().step()
    with pytest.raises(ValueError, match="every is 4 here, and 8 on the workers that this one was to join"):
        made()._take_over(made(every=8)._hand_over())


def test_one_that_cannot_be_joined_ends_alone() -> None:
    from torchft.manager import WorldSizeMode

    from hf_dlion.integrations.torchft import ElasticLocalSteps

    manager: Any = SimpleNamespace(
        _use_async_quorum=False,
        _replica_world_size_mode=WorldSizeMode.DYNAMIC,
        register_state_dict_fn=lambda *_: None,
        start_quorum=lambda: None,
        participating_rank=lambda: 0,
        num_participants=lambda: 1,
        errored=lambda: "no route to host",
        should_commit=lambda: False,
    )
    group: Any = SimpleNamespace(getBackendName=lambda: "torchft-gloo")
    optimizer = ElasticLocalSteps(torch.optim.SGD([torch.nn.Parameter(torch.ones(3))]), manager, group, every=4)
    with pytest.raises(RuntimeError, match="could not be joined with the others, 3 times in a row: no route to host"):
        optimizer.join()
