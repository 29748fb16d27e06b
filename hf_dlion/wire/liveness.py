"""Who failed to answer, when a collective fails.

The error of a backend names no rank: a connection was closed, or a time limit passed; and a rank may wait for one that
itself waits for the lost one. So every process counts up a key of its own in the process group's store, once a second.
After an error, those whose count stands still are the ones that did not answer. What the first rank finds is what all
say, as by then that one may have ended too. Uses ``ProcessGroup.get_group_store`` and ``Store.clone`` of torch; without
the latter, an error names no rank.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from .torch_versions import group_store

HEARTBEAT_SECONDS = 1.0
LISTEN_SECONDS = 3.5
STORE_SECONDS = 5.0


def store_prefix() -> str:
    """Where in the store the ranks of this attempt show that they live."""
    # Otherwise the store is new with each attempt, and the agents of several machines count restarts differently.
    kept = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return f"hf_dlion/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if kept else 0}"


class WorkerLostError(RuntimeError):
    """A collective failed; the message has the ranks that did not answer, and what the backend said."""


class _Heartbeat:
    """Counts up this rank's key while its default process group exists.

    Args:
        group: the default group.
        store: its store, over a connection of its own: waiting for a key blocks everything else on a connection.
    """

    def __init__(self, group: dist.ProcessGroup, store: Any) -> None:
        self.store = store
        self._group = weakref.ref(group)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(dist.get_rank(),), daemon=True)
        self._thread.start()

    def belongs_to(self, group: dist.ProcessGroup | None) -> bool:
        return group is not None and self._group() is group

    def count(self, rank: int, more: int = 0) -> int:
        """The beats of a rank so far, 0 if it has not begun; ``more`` are added."""
        return self.store.add(f"{store_prefix()}/beat/{rank}", more)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join(timeout=1)

    def _beat(self, rank: int) -> None:
        try:
            while self.belongs_to(dist.group.WORLD):
                self.count(rank, 1)
                if self._stopped.wait(HEARTBEAT_SECONDS):
                    return
        except RuntimeError:
            return  # the store is gone; who misses a rank says so


_heartbeat: _Heartbeat | None = None


def start_heartbeat() -> _Heartbeat | None:
    """Show the other ranks from now on that this process lives, if it has a process group; once is enough."""
    global _heartbeat
    group = dist.group.WORLD if dist.is_available() else None
    if group is None:
        return None
    if _heartbeat is None or not _heartbeat.belongs_to(group):
        _stop_heartbeat()
        atexit.unregister(_stop_heartbeat)
        atexit.register(_stop_heartbeat)
        store = group_store(group)
        _heartbeat = _Heartbeat(group, store) if store is not None else None
    return _heartbeat


def _stop_heartbeat() -> None:
    if _heartbeat is not None:
        _heartbeat.stop()


@contextmanager
def report_lost_workers(what: str, group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Inside, this process beats, and an error of the backend becomes one that names who did not answer.

    Args:
        what: is done inside, in a few words.
        group: the ranks that take part; None is the default group.

    Raises:
        WorkerLostError: from the backend's error, some seconds after it.
    """
    start_heartbeat()
    try:
        yield
    except RuntimeError as error:
        heartbeat = start_heartbeat()
        if dist.group.WORLD is None or isinstance(error, WorkerLostError) or not _of_backend(error):
            raise
        # Older torch does not take None for the default group.
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        raise WorkerLostError(_explain(what, error, heartbeat, ranks)) from error


def _of_backend(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _explain(what: str, error: RuntimeError, heartbeat: _Heartbeat | None, ranks: Sequence[int]) -> str:
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if heartbeat is None:
        return (
            f"{what} of {len(ranks)} ranks failed. torch {torch.__version__} cannot name the rank that did not answer, "
            f"as newer ones do: see the logs of all. {_ADVICE} The backend said: {said}"
        )
    lost = _lost(heartbeat, ranks)
    if lost is None:
        return (
            f"{what} failed, and the store of the process group does not answer either: rank 0 or what started it is "
            f"gone, as one of the two hosts the store, or this rank, {dist.get_rank()}, is cut off from them. "
            f"{_ADVICE} The backend said: {said}"
        )
    if not lost:
        return (
            f"{what} failed, though all of the ranks {_listed(ranks)} are alive: the network between two of them is "
            "cut, one needed longer than the time limit of the process group, or the ranks do not call the same "
            f"collectives in the same order. The backend said: {said}"
        )
    return (
        f"{_named(lost)} did not answer: {what} of {len(ranks)} ranks failed, and then there was no sign of life for "
        f"{LISTEN_SECONDS} seconds. The process has ended or hangs, or its machine is gone or cut off: see its log. "
        f"{_ADVICE} The backend said: {said}"
    )


_ADVICE = (
    "`torchrun --max-restarts` starts all ranks again; let the script resume from the last checkpoint, as with "
    "--resume_from_checkpoint."
)


def _lost(heartbeat: _Heartbeat, ranks: Sequence[int]) -> list[int] | None:
    """The ranks that show no sign of life, the same on all that ask; None if the store does not answer in time."""
    found: list[list[int]] = []

    def listen() -> None:
        try:
            finding = f"{store_prefix()}/lost"
            if not heartbeat.store.check([finding]):
                before = [heartbeat.count(rank) for rank in ranks]
                time.sleep(LISTEN_SECONDS)
                silent = [rank for rank, count in zip(ranks, before, strict=True) if heartbeat.count(rank) == count]
                heartbeat.store.compare_set(finding, "", " ".join(map(str, silent)) or "none")
            first = heartbeat.store.get(finding).decode()
            found.append([] if first == "none" else [int(rank) for rank in first.split()])
        except RuntimeError:
            return

    # Not here: over a link that was cut, the store may block for minutes.
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    listener.join(LISTEN_SECONDS + STORE_SECONDS)
    return found[0] if found else None


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_listed(ranks)}"


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
