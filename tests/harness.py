"""Runs a function in several worker processes joined by gloo over loopback."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class WorkerError(AssertionError):
    """Some workers failed; the message has their tracebacks."""


@dataclass
class Outcome:
    """How a worker ended: what it returned, or its traceback, and the exit code of its process."""

    value: Any
    error: str | None
    exit_code: int | None = None


def run_workers(
    function: Callable[..., Any], workers: int, *args: Any, timeout: float = 120, start: str = "forkserver"
) -> list[Any]:
    """``function(rank, *args)`` in each of ``workers`` processes with an initialised process group.

    Args:
        function: importable from a module.
        workers: how many.
        args: picklable.
        timeout: seconds for all of it; a hang is a failure.
        start: how processes are started, as multiprocessing names it.

    Returns:
        What each rank returned.

    Raises:
        WorkerError: a rank raised, died or did not end in time.
    """
    outcomes = run_to_their_ends(function, workers, *args, timeout=timeout, start=start)
    failures = [f"rank {rank}:\n{outcome.error}" for rank, outcome in enumerate(outcomes) if outcome.error]
    if failures:
        raise WorkerError("\n".join(failures))
    return [outcome.value for outcome in outcomes]


def run_to_their_ends(
    function: Callable[..., Any],
    workers: int,
    *args: Any,
    timeout: float = 120,
    collective_timeout: float | None = None,
    start: str = "forkserver",
) -> list[Outcome]:
    """As :func:`run_workers`, where workers may fail, die, or be killed: how each of them ended.

    Args:
        function, workers, args, timeout, start: as there.
        collective_timeout: seconds that the process group gives a collective; None is ``timeout``.
    """
    # A fork server imports once what workers need, and forks before any thread has started but pyarrow's allocator's.
    context: Any = multiprocessing.get_context(start)
    if start == "forkserver":
        context.set_forkserver_preload(["tests.harness", "torch._dynamo", "hf_dlion.trainer.trainer"])
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work,
                args=(
                    function,
                    rank,
                    workers,
                    args,
                    str(Path(folder, "rendezvous")),
                    collective_timeout or timeout,
                    sender,
                ),
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        end = time.monotonic() + timeout
        outcomes = [_receive(pipe, end) for pipe in pipes]
        for process, outcome in zip(processes, outcomes, strict=True):
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
            outcome.exit_code = process.exitcode
        return outcomes


def _receive(pipe: Connection, end: float) -> Outcome:
    if not pipe.poll(max(0, end - time.monotonic())):
        return Outcome(None, "did not end in time")
    try:
        return pickle.loads(pipe.recv_bytes())
    except EOFError:
        return Outcome(None, "died without a word")


def _work(
    function: Callable[..., Any],
    rank: int,
    workers: int,
    args: tuple[Any, ...],
    rendezvous: str,
    timeout: float,
    pipe: Connection,
) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # a Trainer collects garbage after each training, and would search all that was imported
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=workers,
            timeout=timedelta(seconds=timeout),
        )
        outcome = Outcome(function(rank, *args), None)
    except BaseException:
        outcome = Outcome(None, traceback.format_exc())
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    # A rank that failed must not wait for the others to leave the group.
    if outcome.error:
        sys.exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def what_is_logged(name: str = "hf_dlion") -> list[str]:
    """A list that gets the messages of this logger from now on; pytest's caplog does not hear workers.

    Those of ``hf_dlion`` without its warnings of ranks that wait, which a slow machine can bring into any test.
    """
    messages: list[str] = []
    handler = logging.Handler()
    handler.addFilter(lambda record: record.name != "hf_dlion.wire.liveness" or record.name == name)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    return messages
