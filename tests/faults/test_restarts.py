"""torchrun --max-restarts goes on from the last complete checkpoint, without help."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.sharded_training import train
from tests.faults.test_soak import (
    RECORDS,
    SCRIPT,
    WORKERS,
    arguments,
    end_of,
    environment,
    inject,
    progress,
    training,
    undisturbed,
    workers_of,
)
from tests.harness import run_workers

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
STEPS = 60
SAVED = 20  # steps between checkpoints


@pytest.mark.parametrize(
    "fault",
    [
        "kill while saving",
        pytest.param("kill in an exchange", marks=pytest.mark.slow),
        pytest.param("no space", marks=pytest.mark.slow),
    ],
)
def test_goes_on_after(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with training(folder, STEPS, seed=1) as process:
        until = time.monotonic() + 400
        while progress(folder) < SAVED + 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        struck = inject(fault, workers_of(process.pid), random.Random(0))
        assert process.wait(timeout=400) == 0, (folder / "log.txt").read_text()[-3000:]
    assert len(struck) == 1
    for rank in range(WORKERS):
        first, second, last = records_of(folder, rank)
        assert first["resumed_from"] is None
        assert Path(second["resumed_from"]).name == f"checkpoint-{SAVED}"
        assert second["incomplete"] is None
        assert last["step"] == STEPS
    assert len(set(end_of(folder)["checksums"])) == 1


@pytest.mark.skipif(TORCH < (2, 7), reason="torch 2.6 cannot run a model of FSDP2 on a CPU")
def test_sharded_replicas_end_as_if_nothing_had_happened(tmp_path: Path) -> None:
    """A rank is killed when it has written its part of the second checkpoint, so the first one counts."""
    (tmp_path / "undisturbed").mkdir()
    ends = run_workers(train, 4, str(tmp_path / "undisturbed"))
    assert ends[:2] == ends[2:]
    launch = "--standalone --nproc-per-node 4 --max-restarts 1 --monitor-interval 0.3 -m tests.faults.sharded_training"
    command = [sys.executable, "-m", "torch.distributed.run", *launch.split(), str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(4):
        records = [json.loads(line) for line in (tmp_path / f"rank{rank}.jsonl").read_text().splitlines()]
        assert records == [None, str(tmp_path / "checkpoint-3"), ends[rank]]


def records_of(folder: Path, rank: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / RECORDS.format(rank)).read_text().splitlines()]


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) == 0


@contextlib.contextmanager
def machines(folder: Path, steps: int, *options: str) -> Iterator[Callable[[], subprocess.Popen[bytes]]]:
    """Starts another machine, each time it is called, of two or three that train together; the first has the store."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    agents: list[subprocess.Popen[bytes]] = []
    launch = (
        f"--nnodes 2:3 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id {port} --local-addr localhost"
    )
    command = [sys.executable, "-m", "torch.distributed.run", *launch.split(), "--rdzv-endpoint", f"localhost:{port}"]
    words = [*command, str(SCRIPT), *arguments(folder, steps, 1), *options]

    def start() -> subprocess.Popen[bytes]:
        agents.append(subprocess.Popen(words, env=environment(), start_new_session=True))
        wait_until(lambda: accepts(port))
        return agents[-1]

    try:
        yield start
    finally:
        for agent in agents:
            take_away(agent)
            agent.wait()


def take_away(agent: subprocess.Popen[bytes]) -> None:
    for pid in [*workers_of(agent.pid).values(), agent.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_goes_on_with_the_machines_that_are_left(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with machines(folder, STEPS) as start:
        first, second, third = start(), start(), start()
        wait_until(lambda: progress(folder) > SAVED + 1)
        take_away(third)
        assert [agent.wait(timeout=400) for agent in (first, second)] == [0, 0]
    ends = [records_of(folder, rank)[-1] for rank in range(2)]
    assert [end["step"] for end in ends] == [STEPS, STEPS]
    assert ends[0]["checksum"] == ends[1]["checksum"]
    resumed = records_of(folder, 0)[-2]
    assert Path(resumed["resumed_from"]).name in (f"checkpoint-{SAVED}", f"checkpoint-{2 * SAVED}")
    assert json.loads((folder / "results.json").read_text())["workers"] == 2


@pytest.mark.slow
def test_between_votes_a_machine_joins_and_another_is_lost(tmp_path: Path) -> None:
    options = ("--local_steps=8", "--optim=adamw_torch", "--learning_rate=3e-3")
    folder, steps = tmp_path / "run", 8 * SAVED
    folder.mkdir()
    with machines(folder, steps, *options) as start:
        first, second = start(), start()
        wait_until(lambda: progress(folder) > SAVED + 1)
        third = start()
        wait_until(
            lambda: len(workers_of(third.pid)) == 1 and progress(folder) > 4 * SAVED and progress(folder) % 8 == 4
        )
        take_away(third)
        assert [agent.wait(timeout=400) for agent in (first, second)] == [0, 0]
    ends = [records_of(folder, rank)[-1] for rank in range(2)]
    assert [end["step"] for end in ends] == [steps, steps]
    assert ends[0]["checksum"] == ends[1]["checksum"]
    assert [len([one for one in records_of(folder, rank) if "began" in one]) for rank in range(3)] == [3, 3, 1]
    loss = json.loads((folder / "results.json").read_text())["validation_loss_last"]
    others = [undisturbed(tmp_path / str(seed), steps, seed, options)["validation_loss"] for seed in (1, 2)]
    spread = abs(others[0] - others[1])
    assert min(others) - spread < loss < max(others) + spread, (loss, others)


def wait_until(what: Callable[[], bool], seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)
