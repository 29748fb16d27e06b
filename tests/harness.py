"""Runs a function in several worker processes joined by gloo over loopback."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class WorkerError(AssertionError):
    """Some workers failed; the message has their tracebacks."""


def run_workers(function: Callable[..., Any], workers: int, *args: Any, timeout: float = 120) -> list[Any]:
    """``function(rank, *args)`` in each of ``workers`` processes with an initialised process group.

    Args:
        function: importable from a module.
        workers: how many.
        args: picklable.
        timeout: seconds for all of it; a hang is a failure.

    Returns:
        What each rank returned.

    Raises:
        WorkerError: a rank raised, died or did not end in time.
    """
    outcomes = _run(function, workers, args, timeout)
    failures = [f"rank {rank}:\n{text}" for rank, (good, text) in enumerate(outcomes) if not good]
    if failures:
        raise WorkerError("\n".join(failures))
    return [value for _, value in outcomes]


def _run(function: Callable[..., Any], workers: int, args: tuple[Any, ...], timeout: float) -> list[tuple[bool, Any]]:
    # A fork server imports torch once, and forks before any thread has started.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.harness", "hf_dlion", "transformers"])
    with tempfile.TemporaryDirectory() as folder:
        processes, pipes = [], []
        for rank in range(workers):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_work, args=(function, rank, workers, args, str(Path(folder, "rendezvous")), timeout, sender)
            )
            process.start()
            sender.close()
            processes.append(process)
            pipes.append(receiver)
        end = time.monotonic() + timeout
        outcomes = [_receive(pipe, end) for pipe in pipes]
        for process in processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        return outcomes


def _receive(pipe: Connection, end: float) -> tuple[bool, Any]:
    if not pipe.poll(max(0, end - time.monotonic())):
        return False, "did not end in time"
    try:
        good, value = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return False, "died without a word"
    return good, value


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
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=workers,
            timeout=timedelta(seconds=timeout),
        )
        outcome = True, function(rank, *args)
    except BaseException:
        outcome = False, traceback.format_exc()
    pipe.send_bytes(pickle.dumps(outcome))
    pipe.close()
    # A rank that failed must not wait for the others to leave the group.
    if outcome[0] and dist.is_initialized():
        dist.destroy_process_group()
