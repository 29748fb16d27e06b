"""The collectives used here, each entered in the ledger."""

from __future__ import annotations

import atexit
import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from .ledger import Ledger
from .liveness import report_lost_workers
from .torch_versions import all_gather_single, group_count, time_limit

logger = logging.getLogger(__name__)

ALL_GATHER, ALL_TO_ALL = "an all-gather", "an all-to-all"


class Pending(Protocol):
    """A collective on its way."""

    def wait(self) -> Any:
        """Until its tensors are valid."""


class Channel(ABC):
    """A worker's place among the workers, with its ledger: every byte that this package sends goes through here.

    Args:
        rank: this worker's.
        size: N, the number of workers.
        ledger: where the bytes are counted.
    """

    def __init__(self, rank: int, size: int, ledger: Ledger) -> None:
        self.rank = rank
        self.size = size
        self.ledger = ledger

    def all_gather(self, part: Tensor) -> tuple[Tensor, Pending]:
        """Everyone gets everyone's ``part``. One round; (N-1) * |part| bytes sent and received by each rank.

        Args:
            part: any shape, contiguous, the same on every rank.

        Returns:
            ``[N, *part.shape]``, valid once what else is returned has been waited for.
        """
        parts = part.new_empty((self.size, *part.shape))
        size = (self.size - 1) * part.nbytes
        self.ledger.record(size, size)
        return parts, self._all_gather(parts, part)

    def all_to_all(self, parts: Tensor) -> tuple[Tensor, Pending]:
        """Row i goes to rank i. One round; (N-1)/N * |parts| bytes sent and received by each rank.

        Args:
            parts: ``[N, ...]``, contiguous.

        Returns:
            ``[N, ...]``, row i from rank i, valid once what else is returned has been waited for.
        """
        received = torch.empty_like(parts)
        size = (self.size - 1) * parts[0].nbytes
        self.ledger.record(size, size)
        return received, self._all_to_all(received, parts)

    def gather_integers(self, values: list[int], device: torch.device) -> list[list[int]]:
        """Everyone's ``values`` (64 bits each), by rank. One small round."""
        parts, work = self.all_gather(torch.tensor(values, dtype=torch.int64, device=device))
        work.wait()
        return parts.tolist()

    @abstractmethod
    def gather_objects(self, value: Any) -> list[Any]:
        """Everyone's ``value``, by rank. For error messages and checkpoints: pickled, and not in the ledger."""

    @abstractmethod
    def _all_gather(self, parts: Tensor, part: Tensor) -> Pending:
        """Start to fill ``parts``."""

    @abstractmethod
    def _all_to_all(self, received: Tensor, parts: Tensor) -> Pending:
        """Start to fill ``received``."""


class Place(ABC):
    """A worker's place among others that are no process group of torch.distributed: what stands for one.

    Attributes:
        rank: the number of this worker, from 0.
    """

    rank: int

    @property
    @abstractmethod
    def size(self) -> int:
        """N, the number of workers."""

    @abstractmethod
    def channel(self, ledger: Ledger) -> Channel:
        """To the others; there are some."""


class BackendChannel(Channel):
    """Workers joined by a backend of torch, for some of which tensors travel by way of the host's memory."""

    @abstractmethod
    def _by_way_of_host(self, device: torch.device) -> bool:
        """Whether tensors of this device do."""

    def _departing(self, tensor: Tensor) -> Tensor:
        """What the backend is given to send: the tensor itself, or a copy in the host's memory."""
        return _on_host(tensor).copy_(tensor) if self._by_way_of_host(tensor.device) else tensor

    def _landing(self, tensor: Tensor) -> Tensor:
        """What the backend is given to fill."""
        return _on_host(tensor) if self._by_way_of_host(tensor.device) else tensor


class ProcessChannel(BackendChannel):
    """Workers that are processes, joined by torch.distributed.

    Args:
        group: the workers; None is the default group.
        ledger: where the bytes are counted.

    Its collectives, and waiting for them, raise a :class:`WorkerLostError` with the ranks that did not answer.

    A GPU's tensors go to NCCL as they are. Where gloo is all that the group has for them, they travel by way of the
    host's memory: gloo would copy them as well, but not for every collective, nor in every version of torch.
    """

    def __init__(self, group: dist.ProcessGroup | None, ledger: Ledger) -> None:
        super().__init__(dist.get_rank(group), dist.get_world_size(group), ledger)
        self.group = group
        self._backends = dict(pair.split(":") for pair in dist.get_backend_config(group).split(","))
        atexit.unregister(drain_gloo)
        atexit.register(drain_gloo)

    def beside(self, places: Sequence[int] | None = None) -> ProcessChannel:
        """A channel of its own to the same workers, or to those at some places. A collective over these.

        Collectives of the two channels can be under way at once, in any order. Before one to some of the workers, all
        workers call :meth:`align_groups`.
        """
        if places is None:
            self.align_groups()
        own = self.group or dist.group.WORLD
        assert own is not None
        ranks = dist.get_process_group_ranks(own)
        if places is not None:
            ranks = [ranks[place] for place in places]
        config = dist.get_backend_config(own)
        backend = None if config == dist.get_backend_config() else config
        # Only its members make a group.
        group = dist.new_group(ranks, timeout=time_limit(own), backend=backend, use_local_synchronization=True)
        return ProcessChannel(group, self.ledger)

    def align_groups(self) -> None:
        """Let all ranks be in as many process groups, as `beside` needs it. A collective over the workers.

        torch looks for the others of a group that only its members make by a name in which that number is.
        """
        device = torch.device("cpu" if "cpu" in self._backends else next(iter(self._backends)))
        count = group_count()
        counts = ProcessChannel(self.group, Ledger()).gather_integers([count], device)
        for _ in range(max(other for (other,) in counts) - count):
            # By gloo: if the default group is bound to a device, NCCL asks all ranks of it for a new one.
            dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)

    def all_to_all_uneven(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Part i goes to rank i, and a part of ``lengths[i]`` elements comes from there. One round, waited for.

        Args:
            parts: flat, of one dtype; N of them.
            lengths: what each rank sends here.
        """
        sent = torch.cat([part.reshape(-1) for part in parts])
        received = sent.new_empty(sum(lengths))
        sizes = [part.numel() for part in parts]
        width = sent.element_size()
        self.ledger.record((len(sent) - sizes[self.rank]) * width, (len(received) - lengths[self.rank]) * width)
        landing = self._landing(received)
        with report_lost_workers(ALL_TO_ALL, self.group):
            dist.all_to_all_single(landing, self._departing(sent), list(lengths), sizes, group=self.group)
        _land(landing, received)
        return list(received.split(list(lengths)))

    @override
    def gather_objects(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with report_lost_workers("an all-gather of objects", self.group):
            dist.all_gather_object(values, value, group=self.group)
        return values

    @override
    def _all_gather(self, parts: Tensor, part: Tensor) -> Pending:
        sent, landing = self._departing(part), self._landing(parts)
        with report_lost_workers(ALL_GATHER, self.group):
            work = all_gather_single(landing.view(-1), sent.view(-1), group=self.group, async_op=True)
        return UnderWay(work, partial(report_lost_workers, ALL_GATHER, self.group), landing, parts)

    @override
    def _all_to_all(self, received: Tensor, parts: Tensor) -> Pending:
        sent, landing = self._departing(parts), self._landing(received)
        with report_lost_workers(ALL_TO_ALL, self.group):
            work = dist.all_to_all_single(landing, sent, group=self.group, async_op=True)
        return UnderWay(work, partial(report_lost_workers, ALL_TO_ALL, self.group), landing, received)

    @override
    def _by_way_of_host(self, device: torch.device) -> bool:
        backend = self._backends.get(device.type)
        if backend is None and (device.type == "cpu" or "cpu" not in self._backends):
            known = ", ".join(f"{name} for {kind}" for kind, name in self._backends.items())
            raise RuntimeError(
                f"a tensor on {device} is to be sent to the other workers, and their process group has {known} only. "
                "Move the model to such a device before the optimizer is made, or give init_process_group a backend "
                'for both: "cpu:gloo,cuda:nccl".'
            )
        through = device.type != "cpu" and backend in (None, "gloo")
        if through and self.rank == 0:
            _warn_of_way(device.type)
        return through


class UnderWay:
    """A collective under way; what it fills is copied to where it belongs once it has been waited for.

    Args:
        work: of torch.
        reporting: what an error of waiting is raised through.
        landing: what the backend fills.
        target: where it belongs; the same tensor, or on another device.
    """

    def __init__(
        self,
        work: dist.Work | None,
        reporting: Callable[[], AbstractContextManager[None]],
        landing: Tensor,
        target: Tensor,
    ) -> None:
        assert work is not None
        self._work, self._reporting = work, reporting
        self._landing, self._target = landing, target

    def wait(self) -> None:
        """Until the target is valid."""
        with self._reporting():
            self._work.wait()
        _land(self._landing, self._target)


def _on_host(tensor: Tensor) -> Tensor:
    """Memory for it that its device can reach, where that is a GPU."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")


def _land(landing: Tensor, target: Tensor) -> None:
    if landing is not target:
        target.copy_(landing, non_blocking=target.is_cuda)  # torch keeps pinned memory until it is read


@functools.cache
def _warn_of_way(kind: str) -> None:
    logger.warning(
        "the process group has no backend of its own for %s, so what the workers send goes by way of the host's "
        'memory. With one GPU a process, init_process_group("nccl"), or ddp_backend="nccl" of a Trainer, is faster.',
        kind,
    )


def drain_gloo() -> None:
    """Let gloo's threads put down the tensors of the last collective; done before a process group ends.

    They take the GIL for it, and may get to it after the collective has returned. A process that meanwhile exits is
    aborted, and one that destroys the group waits for ever (pytorch/pytorch#190489). torch cannot say when they are
    done; they need microseconds, and get a tenth of a second.
    """
    if dist.is_initialized() and "gloo" in dist.get_backend_config():
        time.sleep(0.1)
