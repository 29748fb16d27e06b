"""Who failed to answer, when a collective fails.

The error of a backend names no rank: a connection was closed, or a time limit passed; and a rank may wait for one that
itself waits for the lost one. So every process counts up a key of its own in the process group's store, once a second.
After an error, those whose count stands still are the ones that did not answer. What the first rank finds is what all
say, as by then that one may have ended too. Uses ``ProcessGroup.get_group_store`` and ``Store.clone`` of torch; without
the latter, an error names no rank.
"""

from __future__ import annotations

import atexit
import logging
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

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 1.0
PATIENCE_SECONDS = 10.0
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

    Attributes:
        step: that this process has come to; None before the first.
        calls: how many collectives it has begun and ended: odd, inside of one.
        waiting: when it began to wait in one, by the monotonic clock, and for which group; None, if it does not.
    """

    def __init__(self, group: dist.ProcessGroup, store: Any) -> None:
        self.store = store
        self.step: int | None = None
        self.calls = 0
        self.waiting: tuple[float, dist.ProcessGroup | None] | None = None
        self._warned: float | None = None
        self._patience = PATIENCE_SECONDS
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

    def apart(self, ranks: Sequence[int]) -> str:
        """Which of the ranks are elsewhere than this one, in words; nothing, if none is."""
        own, elsewhere = str(self.step), dict[str, list[int]]()
        for rank in ranks:
            key = f"{store_prefix()}/place/{rank}"
            step, calls = self.store.get(key).decode().split() if self.store.check([key]) else ("None", "0")
            if (step, calls) != (own, str(self.calls)):
                here = ", but in another collective or none" if step == own else ""
                place = "before its first step" if step == "None" else f"at step {step}{here}"
                elsewhere.setdefault(place, []).append(rank)
        elsewhere = {place: those for place, those in elsewhere.items() if dist.get_rank() not in those}
        where = [f"{_named(those)} {'is' if len(those) == 1 else 'are'} {place}" for place, those in elsewhere.items()]
        return f"{', '.join(where)}, this one at step {own}" if where and self.step is not None else ""

    def _beat(self, rank: int) -> None:
        shown = ""
        try:
            while self.belongs_to(dist.group.WORLD):
                self.count(rank, 1)
                if shown != (place := f"{self.step} {self.calls}"):
                    shown = place
                    self.store.set(f"{store_prefix()}/place/{rank}", place)
                self._warn_of_waiting()
                if self._stopped.wait(HEARTBEAT_SECONDS):
                    return
        except RuntimeError:
            return  # the store is gone; who misses a rank says so

    def _warn_of_waiting(self) -> None:
        """Once a collective; each time it takes longer, since ranks may often be late that save or evaluate."""
        waiting = self.waiting
        if waiting is None or waiting[0] == self._warned or (waits := time.monotonic() - waiting[0]) < self._patience:
            return
        apart = self.apart(dist.get_process_group_ranks(waiting[1] or dist.group.WORLD))
        if apart and waiting == self.waiting:
            logger.warning("waiting for %d seconds: %s. %s", waits, apart, _ELSEWHERE)
            self._warned, self._patience = waiting[0], 2 * waits


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


def show_step(step: int) -> None:
    """Let the other ranks know that this process has come to that step of its training."""
    if (heartbeat := start_heartbeat()) is not None:
        heartbeat.step = step


def _stop_heartbeat() -> None:
    if _heartbeat is not None:
        _heartbeat.stop()


@contextmanager
def report_lost_workers(what: str, group: dist.ProcessGroup | None = None, *, waits: bool = True) -> Iterator[None]:
    """Inside, this process beats, and an error of the backend becomes one that names who did not answer.

    Args:
        what: is done inside, in a few words.
        group: the ranks that take part; None is the default group.
        waits: whether it is one collective, so that to be long in it is to wait for others.

    Raises:
        WorkerLostError: from the backend's error, some seconds after it.
    """
    heartbeat = start_heartbeat()
    if waits and heartbeat is not None:
        heartbeat.calls += 1
        heartbeat.waiting = time.monotonic(), group
    try:
        yield
    except RuntimeError as error:
        heartbeat = start_heartbeat()
        if dist.group.WORLD is None or isinstance(error, WorkerLostError) or not _of_backend(error):
            raise
        # Older torch does not take None for the default group.
        ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
        raise WorkerLostError(_explain(what, error, heartbeat, ranks)) from error
    finally:
        if waits and heartbeat is not None:
            heartbeat.waiting = None
            heartbeat.calls += 1


def _of_backend(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _explain(what: str, error: RuntimeError, heartbeat: _Heartbeat | None, ranks: Sequence[int]) -> str:
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if heartbeat is None:
        return (
            f"{what} of {len(ranks)} ranks failed. torch {torch.__version__} cannot name the rank that did not answer, "
            f"as newer ones do: see the logs of all. {_ADVICE} The backend said: {said}"
        )
    found = _listen(heartbeat, ranks)
    if found is None:
        return (
            f"{what} failed, and the store of the process group does not answer either: rank 0 or what started it is "
            f"gone, as one of the two hosts the store, or this rank, {dist.get_rank()}, is cut off from them. "
            f"{_ADVICE} The backend said: {said}"
        )
    lost, apart = found
    if not lost:
        return (
            f"{what} failed, though all of the ranks {_listed(ranks)} are alive{f' ({apart})' if apart else ''}: the "
            "network between two of them is cut, one needed longer than the time limit of the process group, or the "
            f"ranks do not call the same collectives in the same order. The backend said: {said}"
        )
    return (
        f"{_named(lost)} did not answer: {what} of {len(ranks)} ranks failed, and then there was no sign of life for "
        f"{LISTEN_SECONDS} seconds{f' ({apart})' if apart else ''}. The process has ended or hangs, or its machine is "
        f"gone or cut off: see its log. {_ADVICE} The backend said: {said}"
    )


_ADVICE = (
    "`torchrun --max-restarts` starts all ranks again; let the script resume from the last checkpoint, as with "
    "--resume_from_checkpoint."
)
_ELSEWHERE = (
    "One of them is slow, or calls a collective that the others do not: let all ranks come to evaluations, barriers "
    "and saves."
)


def _listen(heartbeat: _Heartbeat, ranks: Sequence[int]) -> tuple[list[int], str] | None:
    """The ranks that show no sign of life, the same on all that ask, and which are at another step, in words.

    None if the store does not answer in time.
    """
    found: list[tuple[list[int], str]] = []

    def listen() -> None:
        try:
            finding = f"{store_prefix()}/lost"
            if not heartbeat.store.check([finding]):
                before = [heartbeat.count(rank) for rank in ranks]
                time.sleep(LISTEN_SECONDS)
                silent = [rank for rank, count in zip(ranks, before, strict=True) if heartbeat.count(rank) == count]
                heartbeat.store.compare_set(finding, "", " ".join(map(str, silent)) or "none")
            first = heartbeat.store.get(finding).decode()
            lost = [] if first == "none" else [int(rank) for rank in first.split()]
            found.append((lost, heartbeat.apart(ranks)))
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
