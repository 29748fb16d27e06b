"""Workers inside one process: the same collectives, without a network."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Semaphore
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from .collectives import Channel, Pending, Place
from .ledger import Ledger

T = TypeVar("T")


class AbsentError(RuntimeError):
    """Another worker did not come to a collective, because it failed."""


class LocalGroup:
    """N workers, each a thread, that take turns: one runs until its next collective, then the next one does.

    So the order of everything is the same in every run, and nothing runs beside anything else.

    Args:
        size: N.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._threads = ThreadPoolExecutor(size, thread_name_prefix="worker")
        self._turns: list[Semaphore] = []
        self._ended: list[bool] = []
        self._met: list[int] = []
        self._values: dict[int, dict[int, Any]] = {}

    def __reduce__(self) -> tuple[type[LocalGroup], tuple[int]]:
        return LocalGroup, (self.size,)  # threads cannot be copied, and need not be between two runs

    def run(self, work: Callable[[int], T]) -> list[T]:
        """``work(rank)`` of every rank.

        Raises:
            BaseException: what a worker raised; of several, that of the lowest rank.
        """
        self._turns = [Semaphore(0) for _ in range(self.size)]
        self._ended = [False] * self.size
        self._met = [0] * self.size
        self._values = {}
        # A thread has a GPU and a stream of its own choice; work goes on where it was called.
        stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None
        on_stream: Any = nullcontext if stream is None else lambda: torch.cuda.stream(stream)

        def take_part(rank: int) -> T:
            self._turns[rank].acquire()
            try:
                with on_stream():
                    return work(rank)
            finally:
                self._ended[rank] = True
                self._pass_on(rank)

        futures = [self._threads.submit(take_part, rank) for rank in range(self.size)]
        self._turns[0].release()
        errors = [error for error in [future.exception() for future in futures] if error is not None]
        if errors:
            raise next((error for error in errors if not isinstance(error, AbsentError)), errors[0])
        return [future.result() for future in futures]

    def meet(self, rank: int, value: Any) -> list[Any]:
        """Everyone's value, by rank, once all have come; called inside of :meth:`run`.

        Raises:
            AbsentError: a worker ended without coming here.
        """
        meeting = self._met[rank]
        self._met[rank] += 1
        values = self._values.setdefault(meeting, {})
        values[rank] = value
        self._pass_on(rank)
        self._turns[rank].acquire()
        self._values.pop(meeting - 1, None)
        if len(values) < self.size:
            raise AbsentError(f"worker {min(set(range(self.size)) - set(values))} did not come to a collective.")
        return [values[other] for other in range(self.size)]

    def _pass_on(self, rank: int) -> None:
        others = (other % self.size for other in range(rank + 1, rank + 1 + self.size))
        following = next((other for other in others if not self._ended[other]), None)
        if following is not None:
            self._turns[following].release()


@dataclass(frozen=True)
class LocalWorker(Place):
    """A worker's place in a :class:`LocalGroup`."""

    group: LocalGroup
    rank: int

    @property
    @override
    def size(self) -> int:
        return self.group.size

    @override
    def channel(self, ledger: Ledger) -> Channel:
        return LocalChannel(self, ledger)


class LocalChannel(Channel):
    """Workers inside one process. The ledger counts what as many processes would send.

    Args:
        worker: this one.
        ledger: where the bytes are counted.
    """

    def __init__(self, worker: LocalWorker, ledger: Ledger) -> None:
        super().__init__(worker.rank, worker.group.size, ledger)
        self.group = worker.group

    @override
    def gather_objects(self, value: Any) -> list[Any]:
        return self.group.meet(self.rank, value)

    @override
    def _all_gather(self, parts: Tensor, part: Tensor) -> Pending:
        torch.stack(self.group.meet(self.rank, part), out=parts)
        return _Done()

    @override
    def _all_to_all(self, received: Tensor, parts: Tensor) -> Pending:
        torch.stack([theirs[self.rank] for theirs in self.group.meet(self.rank, parts)], out=received)
        return _Done()


class _Done:
    def wait(self) -> None:
        pass
