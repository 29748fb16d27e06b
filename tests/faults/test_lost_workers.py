"""Ranks that die, stop or are cut off: the others say which, and nobody hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_dlion import DistributedLion
from hf_dlion.optim.registry import METHODS
from hf_dlion.wire.exchange import ShardedExchange
from tests.harness import Outcome, run_to_their_ends, run_workers
from tests.trainer import tiny

LOST = "hf_dlion.wire.liveness.WorkerLostError: "


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_for_a_while(*_: Any) -> None:
    subprocess.Popen(["sh", "-c", f"sleep 25; kill -KILL {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def take_steps(rank: int, victim: int, place: str, group: dist.ProcessGroup | None = None) -> None:
    """Some steps, in the third of which the victim meets its fate."""
    weight = torch.nn.Parameter(torch.ones(40_000))
    optimizer = DistributedLion([weight], exchange="sharded", process_group=group)
    for step in range(5):
        if rank == victim and step == 2:
            if place == "backward":
                weight.register_hook(die)
            elif place == "between send and receive":
                ShardedExchange.receive = die  # type: ignore[assignment, method-assign]
            elif place == "between the rounds":
                ShardedExchange.decide = die  # type: ignore[assignment, method-assign]
            else:
                stop_for_a_while()
        optimizer.zero_grad()
        (weight * torch.linspace(1, 2 + rank, 40_000)).sum().backward()
        optimizer.step()


def check_survivors(outcomes: list[Outcome], victim: int) -> None:
    """All but the victim say that it was this one."""
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert outcome.exit_code == -signal.SIGKILL
            continue
        assert f"{LOST}rank {victim} did not answer: " in str(outcome.error), f"rank {rank}: {outcome.error}"
        assert "see its log. `torchrun --max-restarts`" in str(outcome.error)
        assert "The backend said: " in str(outcome.error)
        assert outcome.exit_code == 1


@pytest.mark.parametrize("place", ["backward", "between send and receive", "between the rounds"])
def test_a_killed_rank_is_named_by_all_others(place: str) -> None:
    with ThreadPoolExecutor(3) as side_by_side:
        runs = list(side_by_side.map(lambda v: run_to_their_ends(take_steps, 3, v, place, timeout=100), range(3)))
    for victim, outcomes in enumerate(runs):
        check_survivors(outcomes, victim)


def test_those_who_wait_for_one_who_gave_up_name_the_lost_one() -> None:
    check_survivors(run_to_their_ends(gather_until, 6, 5, timeout=100), 5)


def gather_until(rank: int, victim: int) -> None:
    weight = torch.nn.Parameter(torch.ones(40_000))
    optimizer = DistributedLion([weight], exchange="gather")
    for step in range(3):
        weight.grad = torch.linspace(1, 2 + rank, 40_000)
        if rank == victim and step == 2:
            die()
        optimizer.step()


def test_a_stopped_rank_is_named_after_the_time_limit() -> None:
    check_survivors(run_to_their_ends(take_steps, 3, 1, "stopped", timeout=100, collective_timeout=8), 1)


def late(rank: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = DistributedLion([parameter])
    for step in range(2):
        parameter.grad = torch.linspace(1, 2 + rank, 8)
        if rank == 1 and step == 1:
            time.sleep(20)
        optimizer.step()


def test_a_rank_that_is_late_but_alive_is_not_called_lost() -> None:
    waiting, _ = run_to_their_ends(late, 2, timeout=100, collective_timeout=8)
    assert f"{LOST}an all-gather failed, though all of the ranks 0, 1 are alive" in str(waiting.error)


def in_a_group(rank: int) -> None:
    group = dist.new_group([1, 3])
    if rank in (1, 3):
        take_steps(rank, 3, "between the rounds", group)


def test_ranks_of_a_smaller_group_have_their_global_numbers() -> None:
    outcomes = run_to_their_ends(in_a_group, 4, timeout=100)
    assert f"{LOST}rank 3 did not answer: an all-to-all of 2 ranks failed" in str(outcomes[1].error) or (
        f"{LOST}rank 3 did not answer: an all-gather of 2 ranks failed" in str(outcomes[1].error)
    )
    assert [outcomes[rank].error for rank in (0, 2)] == [None, None]


def host_dies(rank: int, port: int) -> None:
    take_steps(rank, -1, "nowhere")
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    take_steps(rank, 0, "between the rounds")


def test_the_store_dies_with_its_rank() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for outcome in run_to_their_ends(host_dies, 3, port, timeout=100)[1:]:
        assert "the store of the process group does not answer either: rank 0 or what started it" in str(outcome.error)
        assert LOST in str(outcome.error)


class Dies(TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.die)

    def die(self, _: Any, state: Any, *rest: Any, **more: Any) -> None:
        if state.global_step >= 2:
            die()


def train_until(rank: int, folder: str, victim: int, event: str) -> None:
    trainer = tiny.trainer(rank, folder, max_steps=8, logging_steps=2)
    if rank == victim:
        trainer.add_callback(Dies(event))
    trainer.train()


@pytest.mark.parametrize(
    ("victim", "event", "failed"), [(2, "on_step_begin", "an all-"), (0, "on_step_end", "training of 3 ranks")]
)
def test_the_trainer_names_the_lost_rank(victim: int, event: str, failed: str, tmp_path: Path) -> None:
    """At the end of a step that is logged, it is a gather of the Trainer that fails."""
    outcomes = run_to_their_ends(train_until, 3, str(tmp_path), victim, event, timeout=100)
    check_survivors(outcomes, victim)
    assert all(f"did not answer: {failed}" in str(o.error) for o in outcomes[:victim] + outcomes[victim + 1 :])


def other_errors(rank: int) -> str:
    trainer = tiny.trainer(rank, "unused", max_steps=1)
    trainer.create_optimizer = lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory"))  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="^out of memory$") as caught:
        trainer.train()
    return type(caught.value).__name__


def test_errors_that_are_not_of_the_backend_stay_as_they_are() -> None:
    assert run_workers(other_errors, 2) == ["RuntimeError"] * 2
