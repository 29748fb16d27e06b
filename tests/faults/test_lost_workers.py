"""Ranks that die, stop or are cut off: the others say which, and nobody hangs."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_dlion import DistributedLion, LocalSteps
from hf_dlion.optim.agreement import Agreement
from hf_dlion.wire import liveness
from hf_dlion.wire.conversation import Conversation
from hf_dlion.wire.exchange import Ballot, Decision, ShardedExchange, Voters
from hf_dlion.wire.liveness import report_lost_workers
from tests.faults.victims import LOST, check_survivors, die, needs_names
from tests.harness import run_to_their_ends, run_workers, what_is_logged
from tests.links import NEEDS_ROOT, links, namespaces_work

DECIDE = ShardedExchange.decide


def stop_for_a_while(*_: Any) -> None:
    subprocess.Popen(["sh", "-c", f"sleep 18; kill -KILL {os.getpid()}"])
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
                ShardedExchange.decide = die_when_sent  # type: ignore[method-assign]
            elif place == "between the rounds":
                Agreement.voters = die  # type: ignore[method-assign]
            else:
                stop_for_a_while()
        optimizer.zero_grad()
        (weight * torch.linspace(1, 2 + rank, 40_000)).sum().backward()
        optimizer.step()


def die_when_sent(self: ShardedExchange, ballot: Ballot, voters: Voters) -> Conversation[Decision | None]:
    next(DECIDE(self, ballot, voters))
    die()
    yield
    return None


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


@pytest.mark.parametrize("delay", [0, 2])
def test_a_rank_that_is_killed_between_two_votes_is_named_at_the_next(delay: int) -> None:
    check_survivors(run_to_their_ends(step_locally_until, 3, 1, delay, timeout=100), 1)


def step_locally_until(rank: int, victim: int, delay: int) -> None:
    """With a delay, the victim's votes are on their way when it dies."""
    weight = torch.nn.Parameter(torch.ones(40_000))
    optimizer = LocalSteps(torch.optim.SGD([weight], lr=0.1), every=3, delay=delay)
    for step in range(9):
        weight.grad = torch.linspace(1, 2 + rank, 40_000)
        if rank == victim and step == 4:
            die()
        optimizer.step()


def test_a_stopped_rank_is_named_after_the_time_limit() -> None:
    check_survivors(run_to_their_ends(take_steps, 3, 1, "stopped", timeout=100, collective_timeout=8), 1)


def late(rank: int, where: str) -> tuple[str, list[str]]:
    """The last rank is slow, in a barrier that the others do not call, or does not come to the log after step 0."""
    liveness.PATIENCE_SECONDS = 2.0
    said = what_is_logged("hf_dlion.wire.liveness")
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = DistributedLion([parameter])
    last = rank == dist.get_world_size() - 1
    dist.barrier()  # ranks that start one after the other would warn of that
    try:
        for step in range(2):
            parameter.grad = torch.linspace(1, 2 + rank, 8)
            if last and step == 1:
                time.sleep(2)  # until all know that it has come to step 0
                dist.barrier() if where == "barrier" else time.sleep(13)
            optimizer.step()
            if where == "log" and not last:
                optimizer.vote_shares()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}", said
    return "nothing", said


@needs_names
@pytest.mark.parametrize(
    ("where", "ranks", "apart"),
    [
        ("slow", 2, "rank 1 is at step 0, this one at step 1"),
        ("barrier", 3, "rank 2 is at step 0, this one at step 1"),
        ("log", 2, "rank 1 is at step 0, but in another collective or none, this one at step 0"),
    ],
)
def test_a_rank_that_is_waited_for_but_alive_is_not_called_lost(where: str, ranks: int, apart: str) -> None:
    waiting = run_to_their_ends(late, ranks, where, timeout=100, collective_timeout=8)[:-1]
    for error, said in [outcome.value for outcome in waiting]:
        [warning] = [one for one in said if apart in one]
        assert re.match(rf"waiting for [2-7] seconds: {apart}\. One of them is slow, or calls a collective", warning)
        assert f"({apart})" in error
        if where != "barrier":  # which ends first, and its process with it
            assert error.startswith("WorkerLostError: an all-gather failed, though all of the ranks 0, 1 are alive (")


def in_a_group(rank: int) -> None:
    group = dist.new_group([1, 3])
    dist.barrier()  # a rank that ends while another still connects makes that fail
    if rank in (1, 3):
        take_steps(rank, 3, "between the rounds", group)


@needs_names
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


@needs_names
def test_the_store_dies_with_its_rank() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for outcome in run_to_their_ends(host_dies, 3, port, timeout=100)[1:]:
        assert "the store of the process group does not answer either: rank 0 or what started it" in str(outcome.error)
        assert LOST in str(outcome.error)


def other_errors(rank: int) -> str:
    dist.barrier()  # a rank that ends while another still connects makes that fail
    with pytest.raises(RuntimeError, match="^out of memory$") as caught, report_lost_workers("training"):
        raise RuntimeError("out of memory")
    return type(caught.value).__name__


def test_errors_that_are_not_of_the_backend_stay_as_they_are() -> None:
    assert run_workers(other_errors, 2) == ["RuntimeError"] * 2
    with pytest.raises(dist.DistStoreError), report_lost_workers("no process group"):
        raise dist.DistStoreError


@pytest.mark.parametrize(("kept", "attempts"), [("True", ["0", "1"]), ("False", ["0", "0"])])
def test_an_attempt_has_keys_of_its_own(kept: str, attempts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The agents of several machines count restarts differently; but then the store is that of the attempt."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", kept)
    for count, attempt in enumerate(attempts):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(count))
        assert liveness.store_prefix() == f"hf_dlion/{attempt}"


LINKED = """
import sys
from datetime import timedelta
import torch.distributed as dist
from tests.faults.test_lost_workers import exchange_for_ever

rank = int(sys.argv[1])
method = "tcp://10.0.0.1:29500"
dist.init_process_group("gloo", init_method=method, rank=rank, world_size=3, timeout=timedelta(seconds=8))
exchange_for_ever(rank)
"""


def exchange_for_ever(rank: int) -> None:
    weight = torch.nn.Parameter(torch.ones(40_000))
    optimizer = DistributedLion([weight], exchange="sharded", lr=0.0)
    for step in itertools.count():
        weight.grad = torch.linspace(1, 2 + rank, 40_000)
        optimizer.step()
        if step == 3:
            sys.stdout.write("under way\n")
            sys.stdout.flush()


@needs_names
@pytest.mark.skipif(not namespaces_work(), reason=NEEDS_ROOT)
def test_a_cut_link_is_named_on_both_sides() -> None:
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(Path(__file__).parents[2])}
    with links(3) as network:
        workers = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, "-c", LINKED, str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank, name in enumerate(network.namespaces)
        ]
        try:
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "under way\n"
            network.set(2, "down")
            errors = [worker.communicate(timeout=60)[1] for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    for error in errors[:2]:
        assert f"{LOST}rank 2 did not answer: an all-" in error
    assert "or this rank, 2, is cut off from them" in errors[2]
    assert [worker.returncode for worker in workers] == [1, 1, 1], errors
