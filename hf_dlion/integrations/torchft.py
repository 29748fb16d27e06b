"""torchft: workers that make local steps, and come and go without a restart of the others.

Before each vote, a ``torchft.Manager`` finds out who is there, joins them in a process group, and gives those who are
new the state of one of the others. Whoever is lost takes along what it has done since the last vote, and no more.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, AllToAllOptions
from torch.nn.functional import pad
from torch.optim import Optimizer
from torchft import Manager
from torchft.manager import WorldSizeMode
from torchft.process_group import ProcessGroup
from typing_extensions import override

from ..optim.local_steps import BUFFER, OWN, SINCE, LocalSteps
from ..optim.replica import STEP
from ..optim.states import WORKER, all_parameters
from ..optim.tensors import local
from ..wire.collectives import ALL_GATHER, ALL_TO_ALL, BackendChannel, Channel, Pending, Place, UnderWay
from ..wire.ledger import Ledger
from ..wire.liveness import WorkerLostError

if not version("torchft").startswith("0.2."):
    raise ImportError(f"torchft {version('torchft')} is installed, and 0.2 is what this was written for.")

logger = logging.getLogger(__name__)

_KEY, _OPTIONS = "hf_dlion", "options"
_MOST_FAILURES = 3


class QuorumPlace(Place):
    """A worker's place in the present quorum; alone before the first.

    Args:
        manager: of the worker.
        group: with which the manager was made.
    """

    def __init__(self, manager: Manager, group: ProcessGroup) -> None:
        self._manager, self._group = manager, group
        self.rank, self._size = 0, 1

    def __deepcopy__(self, memo: object) -> QuorumPlace:
        return self

    @property
    @override
    def size(self) -> int:
        return self._size

    @override
    def channel(self, ledger: Ledger) -> Channel:
        return QuorumChannel(self, self._group, ledger)

    def find(self) -> None:
        """A quorum of those who are there. Who is behind the others takes over what one of them hands over."""
        self._manager.start_quorum()
        self.rank, self._size = self._manager.participating_rank() or 0, self._manager.num_participants()


class QuorumChannel(BackendChannel):
    """The workers of one quorum. Its collectives raise a :class:`WorkerLostError` if one of them is lost.

    Args:
        place: this worker's.
        group: as the manager has configured it.
        ledger: where the bytes are counted.
    """

    def __init__(self, place: Place, group: ProcessGroup, ledger: Ledger) -> None:
        super().__init__(place.rank, place.size, ledger)
        self._group = group

    @override
    def gather_objects(self, value: Any) -> list[Any]:
        own = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = torch.empty(self.size, dtype=torch.int64)
        self._all_gather(sizes, torch.tensor([len(own)])).wait()
        longest = int(sizes.max())
        parts = torch.empty((self.size, longest), dtype=torch.uint8)
        self._all_gather(parts, pad(own, (0, longest - len(own)))).wait()
        return [pickle.loads(part[:size].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    @override
    def _all_gather(self, parts: Tensor, part: Tensor) -> Pending:
        sent, landing = self._departing(part), self._landing(parts)
        with _report_lost_workers(ALL_GATHER):
            work = self._group.allgather_into_tensor_coalesced([landing.view(-1)], [sent.view(-1)], AllgatherOptions())
        return UnderWay(work, partial(_report_lost_workers, ALL_GATHER), landing, parts)

    @override
    def _all_to_all(self, received: Tensor, parts: Tensor) -> Pending:
        sent, landing = self._departing(parts), self._landing(received)
        with _report_lost_workers(ALL_TO_ALL):
            work = self._group.alltoall_base(landing, sent, [], [], AllToAllOptions())
        return UnderWay(work, partial(_report_lost_workers, ALL_TO_ALL), landing, received)

    @override
    def _by_way_of_host(self, device: torch.device) -> bool:
        return device.type != "cpu"


@contextmanager
def _report_lost_workers(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's own errors of distributed backends are
        raise WorkerLostError(f"{what} among the workers of this quorum failed: {error}") from error


class ElasticLocalSteps(LocalSteps):
    """Local steps of workers that come and go: :class:`hf_dlion.LocalSteps` whose votes are of those who are there.

    ::

        optimizer = ElasticLocalSteps(inner, manager, group, every=16)
        if optimizer.join():  # others had begun
            scheduler.step()

    ``examples/elastic_loop.py`` has all of it. Every worker is a replica group of torchft, of one process.

    :meth:`join` is a vote, too, of a worker that has not
    moved: it waits for the others to come to theirs, takes x_0, the outer and an inner state and the number of steps
    from one of them, and goes on with them. A scheduler, and what else must be the same on all workers, goes the same
    way, if it is registered with the manager (``register_state_dict_fn``). Buffers and frozen parameters do not: each
    worker begins with the same.

    Where a worker is lost between two votes, the others vote without it. Where it is lost in a vote, they vote again,
    on what they had moved by. A worker that was cut off, or came too late, goes on from where the others are: its
    number of steps, ``param_groups[0]["step"]``, jumps, so that it ends when they do. The timeouts of the group and the
    manager are longer than sending the state takes; that of a quorum, and the lighthouse's for joining, longer than a
    round of the slowest worker.

    Args:
        inner: as of :class:`hf_dlion.LocalSteps`.
        manager: made with ``use_async_quorum=False``.
        group: the one that the manager was made with.
        every: H, inner steps from one vote to the next.
        options: those of :class:`hf_dlion.LocalSteps`, but for ``fragments`` and ``delay``.

    Raises:
        ValueError: an argument out of its range; a manager with asynchronous quorums or spares; a group that is not
            gloo.
    """

    def __init__(self, inner: Optimizer, manager: Manager, group: ProcessGroup, *, every: int, **options: Any) -> None:
        _check(manager, group, options)
        self._manager, self._place = manager, QuorumPlace(manager, group)
        self._joined = self._taken_over = self._ends_a_step = False
        super().__init__(inner, every=every, process_group=self._place, **options)
        manager.register_state_dict_fn(_KEY, self._take_over, self._hand_over)

    @torch.no_grad()
    def join(self) -> bool:
        """Be one of the workers from now on. Before the first batch; waits for the next vote of the others.

        Returns:
            Whether they have made steps already. They are at the end of one then, and what follows a step is to be
            done here, too: ``scheduler.step()``.
        """
        self._joined, self._ends_a_step = True, False
        self._begin()
        self._vote_in_quorum()
        return self._ends_a_step

    @override
    @torch.no_grad()
    def vote(self) -> None:
        if self.between_votes:
            self._vote_in_quorum()

    @override
    def _begin(self, *_: object) -> None:
        """Nothing is said to the others but in a vote: any of them may be lost."""
        if not self._joined:
            raise RuntimeError("this worker has not joined the others. Call join() before the first batch.")
        self.make_state()
        if not self.between_votes:
            self._agree(range(len(all_parameters(self))))

    def _vote_in_quorum(self) -> None:
        """Vote with those who are there, until a vote stands.

        Raises:
            RuntimeError: this worker could not be joined with others, several times in a row.
        """
        parameters, bad = [local(parameter) for parameter in all_parameters(self)], self._bad_gradient
        everything, held = range(len(parameters)), self._changing()
        before, failures = [tensor.clone() for tensor in held], 0
        while True:
            self._taken_over = False
            self._place.find()
            self.state_changed()  # it may be of others
            if self._taken_over:
                self._go_back(everything)
                bad, held = -1, self._changing()
                before = [tensor.clone() for tensor in held]
            self._bad_gradient, error = bad, self._manager.errored()
            failures = 0 if error is None else failures + 1
            if failures == _MOST_FAILURES:
                raise RuntimeError(
                    f"this worker could not be joined with the others, {failures} times in a row: {error}. Is every "
                    "machine reached by its host name from the others, and is what is registered with the manager as "
                    "good as it should be?"
                )
            if error is None:  # else one was lost while they were joined
                self._try_to_vote(before[: len(parameters)])
            if self._manager.should_commit():
                break
            torch._foreach_copy_(held, before)
        self._agree(everything)
        for group in self.param_groups:
            group[SINCE] = 0

    def _try_to_vote(self, own: Sequence[Tensor]) -> None:
        """A vote on how far this worker has come; the manager is told if another one is lost meanwhile."""
        made = self.param_groups[0][STEP]
        try:
            self._exchange_votes(dict(enumerate(own)), made)
            if (channel := self._current_plan().channel) is not None:  # else one would keep what another has not got
                channel.gather_integers([made], torch.device("cpu"))
        except WorkerLostError as error:
            logger.warning("a vote failed, and is held again with the workers that are left: %s", error)
            self._manager.report_error(error)

    def _changing(self) -> list[Tensor]:
        """What a vote changes: the parameters, and then the outer momenta."""
        parameters = all_parameters(self)
        momenta = [self.state[parameter].get(BUFFER) for parameter in parameters]
        return [*map(local, parameters), *(momentum for momentum in momenta if momentum is not None)]

    def _hand_over(self) -> dict[str, Any]:
        """What one who joins goes on from: x_0, the outer and the inner state, the param groups."""
        state = self.state_dict()
        for held in state["state"].values():
            held.pop(OWN, None)
        for group in state["param_groups"]:
            group.pop(WORKER, None)
        return state | {_OPTIONS: self._described()}

    def _take_over(self, state: dict[str, Any]) -> None:
        """Take what another one has handed over.

        Raises:
            ValueError: it is of another method or options, or of another model.
        """
        theirs, own = state[_OPTIONS], self._described()
        for name in {**own, **theirs}:
            if theirs.get(name) != own.get(name):
                raise ValueError(
                    f"{name} is {own.get(name)!r} here, and {theirs.get(name)!r} on the workers that this one was to "
                    "join. Make it the same."
                )
        made = self.param_groups[0][STEP]
        self.load_state_dict({name: value for name, value in state.items() if name != _OPTIONS})
        now = self.param_groups[0][STEP]
        if now < made:
            logger.warning("this worker had made %d steps, and goes on from the %d of the others", made, now)
        self._taken_over, self._ends_a_step = True, self.between_votes

    def _described(self) -> dict[str, Any]:
        return {"method": self.method, **self.options()}


def _check(manager: Manager, group: ProcessGroup, options: Mapping[str, Any]) -> None:
    """Raise ValueError where workers could not come and go."""
    if manager._use_async_quorum:
        raise ValueError(
            "the manager was made with use_async_quorum=True, so that workers would vote before they know with whom. "
            "Make it with use_async_quorum=False."
        )
    if manager._replica_world_size_mode != WorldSizeMode.DYNAMIC:
        raise ValueError(
            "the manager was made with a fixed number of workers, and spares, which have no vote. Make it with "
            "world_size_mode=WorldSizeMode.DYNAMIC."
        )
    if "gloo" not in group.getBackendName():
        raise ValueError(
            f"the group is {group.getBackendName()}, which does not say in time that a worker was lost. Make it a "
            "torchft.process_group.ProcessGroupGloo, which a GPU's tensors reach by way of the host's memory."
        )
    if streamed := {"fragments", "delay", "process_group"} & options.keys():
        raise ValueError(f"{min(streamed)} of LocalSteps is not for workers that come and go. Leave it out.")
    if options.get("exchange") == "hierarchical":
        raise ValueError("exchange='hierarchical' is not for workers that come and go. Leave it out.")
