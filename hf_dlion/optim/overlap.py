"""Votes that leave while backward still computes other gradients.

A step's buckets are sent in one order on all ranks. When a bucket leaves is each rank's own business: as soon as its
gradients are complete, or in ``step()``. The headers travel beside them, in ``step()``, and nothing is applied before
they are known. If what was sent turns out not to hold on some rank (a gradient changed afterwards, by clipping say, or
a worker abstains), its header says so, and all ranks drop the decisions and exchange again. So no bit depends on the
guess of when a gradient is complete.
"""

from __future__ import annotations

import logging
import queue
import threading
import weakref
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ..bits.streams import Mark, follow, mark, stream_beside
from ..wire.collectives import Channel, ProcessChannel
from ..wire.conversation import Conversation, run, side_by_side
from ..wire.exchange import Ballot, Decision, Exchange, VoteStatistics
from ..wire.shards import Shards
from .agreement import CHANGED_GRADIENT, Agreement, Header, StepInputs
from .arrivals import Arrivals
from .bad_gradients import first_bad_gradient
from .layout import Bucket
from .replica import STEP, Layout, layout_of
from .states import all_parameters
from .tensors import local, local_gradient
from .views import SegmentViews

logger = logging.getLogger(__name__)

BUCKETS = 16
"""Into how many buckets a step's words are cut, if they are not too small then: backward hides all but the last."""

_MOST_CHANGES = 3

_WHY_NOT = (
    "votes are exchanged after backward, not beside it, from now on: gradients change between backward and step(), as "
    "clipping and gradient scalers change them. Without that (max_grad_norm=0%s) backward hides the exchange."
)
_IN_ITS_PLACE = ", or norm_gradients=True, which makes clipping needless"  # of shards, it needs whole norms


_Result = tuple[Bucket, Decision, Mark]


class Plan(Protocol):
    """What votes are laid out by, as of ``VotePlan``."""

    @property
    def views(self) -> SegmentViews:
        """Of the parameters."""

    @property
    def layout(self) -> Layout:
        """Of the parameters that it was made for."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """By number."""

    @property
    def buckets_of(self) -> Sequence[Sequence[int]]:
        """By parameter, the numbers of those with a part of it."""

    @property
    def shards(self) -> Shards | None:
        """Of a sharded replica."""


class Voter(Protocol):
    """The optimizer whose votes leave early."""

    agreement: Agreement
    param_groups: list[dict[str, Any]]

    @property
    def plan(self) -> Any:
        """The present one."""

    def begin_ballots(self, plan: Any) -> Any:
        """What the ballots of one step have in common."""

    def pack_early(self, plan: Any, bucket: Bucket, ballots: Any, gradients: Sequence[Tensor | None]) -> Tensor:
        """Own votes on a bucket; changes no state."""


class EarlyVotes:
    """One optimizer's votes that leave during backward. A step is watched first, then the ranks agree on an order.

    Args:
        optimizer: whose votes.
        plan: its layout; its exchange gets a channel of its own.
        exchange: that of the plan.
        channel: the workers.
        before: those of the optimizer's former plan; their channel is taken over.

    Attributes:
        plan: as given.
        closed: whether no votes are sent early any more.
        under_way: whether the ranks send the buckets of the present step in their agreed order.
    """

    def __init__(
        self,
        optimizer: Voter,
        plan: Plan,
        exchange: Exchange,
        channel: ProcessChannel,
        before: EarlyVotes | None,
    ) -> None:
        self.plan = plan
        self.under_way = False
        self._optimizer = weakref.ref(optimizer)
        self._exchange = exchange
        self._channel = channel
        self._world = dist.group.WORLD
        self._beside: ProcessChannel | None = None
        # NCCL wants one communicator after the other in one order on all ranks: headers follow the votes there.
        self._headers_last = plan.views.device.type == "cuda"
        self._stream = stream_beside(plan.views.device)
        if before is not None and (before._world, before._channel.group) == (self._world, channel.group):
            self._beside = before._beside
        self._order: Sequence[Bucket] = ()
        self._changes = 0
        self.closed = False
        self._watch()
        self._start()

    @torch.no_grad()
    def finish(self, inputs: StepInputs) -> Iterator[tuple[Bucket, Decision]] | None:
        """Send what has not been sent, and learn whether what was sent holds. A collective over the workers.

        Args:
            inputs: of the step.

        Returns:
            The decisions, as they come; None, on all ranks, where votes that were sent do not hold.
        """
        follow(self._last_packed)
        holds = self._holds(inputs)
        if not holds and inputs.bad_gradient < 0:
            inputs = replace(inputs, bad_gradient=CHANGED_GRADIENT, verdict=None)
        header = self._agreement.header(inputs)
        if self._headers_last:
            self._send_rest(inputs, holds)
            self._conversations.put(self._hear(self._exchange.channel, header, mark(header.device)))
            self._conversations.put(None)
            decisions: Iterator[tuple[Bucket, Decision]] = iter(list(self._decided()))
        else:
            hearing = self._hear(self._channel, header, None)
            next(hearing)
            self._send_rest(inputs, holds)
            self._conversations.put(None)
            run(hearing)
            decisions = self._decided()
        self.under_way = False
        if self._agreement.stands(self._headers, len(self.plan.buckets_of)):
            self._changes = 0
            return decisions
        for _ in decisions:
            pass
        if self._statistics is not None:
            self._exchange.statistics = self._statistics
        self._changes += 1
        return None

    def good_gradients(self) -> Container[int]:
        """Indices of gradients that were finite when their votes left, and are as they were; before any is touched."""
        self._arrivals.read_shards(self._sent_parameters() if self.agreed else self._arrivals.order)
        same = list(map(id, all_parameters(self._owner()))) == list(map(id, self._arrivals.parameters))
        return self._good if self.under_way and same and self._arrivals.unchanged(self._good) else ()

    def look(self) -> None:
        """At the beginning of a step, before the ranks have agreed: whether gradients are as backward has left them."""
        voted = [index for index in self._arrivals.order if self.plan.buckets_of[index]]
        self._unchanged = self._arrivals.unchanged(voted)

    def next_step(self) -> None:
        """After a step: agree with the others, if that is still to be done, and begin to listen for the next one."""
        if self.closed:
            return
        if not self._order:
            self._agree()
        elif self._changes == _MOST_CHANGES:
            self.close()
        elif self._changes:
            self._arrivals.close()
            self._watch()  # parameters may have been frozen or not, or come more often
        self._arrivals.next_step()
        self._start()

    def close(self) -> None:
        """Send no votes early any more. On all ranks alike."""
        self.closed = True
        self._arrivals.close()
        shards = self.plan.shards
        if self._channel.rank == 0 and (shards is None or shards.rank == 0) and self._changes == _MOST_CHANGES:
            logger.warning(_WHY_NOT, _IN_ITS_PLACE if shards is None else "")

    @property
    def channel_beside(self) -> Channel:
        """For what else is exchanged in a step, once its votes are being decided."""
        return self._exchange.channel if self._headers_last else self._channel

    @property
    def agreed(self) -> bool:
        """Whether the ranks have agreed on an order."""
        return bool(self._order)

    @property
    def _agreement(self) -> Agreement:
        return self._owner().agreement

    def _owner(self) -> Voter:
        owner = self._optimizer()
        assert owner is not None  # it is in its step, or in backward of its parameters
        return owner

    def _watch(self) -> None:
        self._arrivals = Arrivals(all_parameters(self._owner()), self._complete)
        self._needed = [len(self._arrivals.watched & set(bucket.parameters)) for bucket in self.plan.buckets]

    def _start(self) -> None:
        self.under_way = bool(self._order) and not self.closed
        self._missing = list(self._needed)
        self._sent = 0
        self._checked: set[int] = set()
        self._good: set[int] = set()
        self._ballots: Any = None
        self._statistics: VoteStatistics | None = None
        self._headers: Sequence[Header] = ()
        self._last_packed = mark(self.plan.views.device)
        self._conversations: queue.SimpleQueue[Conversation[None] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[_Result | BaseException | None] = queue.SimpleQueue()

    def _agree(self) -> None:
        """On an order of the buckets, that in which rank 0's became complete; or not to send early. A collective."""
        never = len(self.plan.buckets_of)
        places = {index: place for place, index in enumerate(self._arrivals.order)}
        ends = [
            max((places.get(i, never) for i in bucket.parameters if i in self._arrivals.watched), default=-1)
            for bucket in self.plan.buckets
        ]
        order = sorted(range(len(ends)), key=lambda number: (ends[number], number))
        changed, useless = int(not self._unchanged), int(min(ends) == never)
        if self.plan.shards is not None:
            changed, useless = self.plan.shards.combine([changed, useless], self.plan.views.device)
        answers = self._channel.gather_integers([changed, useless, *order], self.plan.views.device)
        if not any(answer[0] or answer[1] for answer in answers):
            self._changes = 0
            self._order = [self.plan.buckets[number] for number in answers[0][2:]]
            self._beside = self._beside or self._channel.beside()
            self._exchange.channel = self._beside
            return
        if not any(answer[0] for answer in answers):
            self.close()
            return
        self._changes += 1
        if self._changes == _MOST_CHANGES:
            self.close()

    def _complete(self, index: int) -> None:
        if not self.under_way:
            return
        for number in self.plan.buckets_of[index]:
            self._missing[number] -= 1
        while self._sent < len(self._order) and self._missing[self._order[self._sent].number] == 0:
            if self._ballots is None and self._changed_layout():
                return  # resized, converted or taken out since the last step: the ranks lay out anew in step()
            self._send_early(self._order[self._sent])

    def _changed_layout(self) -> bool:
        return layout_of([local(parameter) for parameter in all_parameters(self._owner())]) != self.plan.layout

    @torch.no_grad()
    def _send_early(self, bucket: Bucket) -> None:
        follow(self._last_packed)
        views, parameters = self.plan.views, all_parameters(self._owner())
        gradients: list[Tensor | None] = [None] * len(parameters)
        for index in bucket.parameters:
            gradient = local_gradient(parameters[index], type(self._owner()).__name__)
            gradients[index] = None if gradient is None else views.flat(index, gradient)
        # While packing brings them into the cache; unless the step will know their norm.
        if views.device.type == "cpu" and not self._agreement.known_finite.hears_of_norms:
            new = [index for index in bucket.parameters if index not in self._checked]
            if first_bad_gradient([gradients[index] for index in new]) < 0:
                self._good.update(new)
            self._checked.update(new)
        self._send(bucket, gradients)

    def _send_rest(self, inputs: StepInputs, holds: bool) -> None:
        for bucket in self._order[self._sent :]:
            self._send(bucket, inputs.gradients if holds else None)

    def _send(self, bucket: Bucket, gradients: Sequence[Tensor | None] | None) -> None:
        """Hand a bucket over; without gradients, its votes are of no meaning."""
        device = self.plan.views.device
        if self._ballots is None:
            self._settings, self._views = self._read_settings(), self.plan.views.parameters
            self._ballots = self._owner().begin_ballots(self.plan)
            self._statistics = self._exchange.statistics.copy()
            threading.Thread(target=self._talk, name="votes", daemon=True).start()
        if gradients is None:
            words = torch.zeros(bucket.blocks * 32, dtype=torch.int32, device=device)
        else:
            words = self._owner().pack_early(self.plan, bucket, self._ballots, gradients)
        no_header = torch.empty(0, dtype=torch.int32, device=device)
        ballot = Ballot(words, no_header, self._ballots.inputs.step, bucket.padding)
        self._sent += 1
        self._last_packed = mark(device)
        self._conversations.put(self._decide(bucket, ballot, self._last_packed))

    def _decide(self, bucket: Bucket, ballot: Ballot, packed: Mark) -> Conversation[None]:
        follow(packed, ballot.words)
        decision = yield from self._exchange.decide(ballot, lambda headers: range(self._channel.size))
        assert decision is not None  # all vote
        self._results.put((bucket, decision, mark(ballot.words.device)))

    def _hear(self, channel: Channel, header: Tensor, packed: Mark) -> Conversation[None]:
        follow(packed, header)
        headers, on_its_way = channel.all_gather(header)
        yield
        on_its_way.wait()
        self._headers = Header.unpack(headers)

    def _talk(self) -> None:
        conversations, results = self._conversations, self._results
        try:
            with self._stream:
                side_by_side(iter(conversations.get, None))
        except BaseException as error:
            results.put(error)
        else:
            results.put(None)

    def _decided(self) -> Iterator[tuple[Bucket, Decision]]:
        """Each bucket's decision as it comes; raises what the thread has raised."""
        while True:
            result = self._results.get()
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            bucket, decision, counted = result
            follow(counted, *decision.planes)
            yield bucket, decision

    def _holds(self, inputs: StepInputs) -> bool:
        """Whether what was sent is what would be sent now, and what is still to be sent can be."""
        if self._owner().plan is not self.plan or inputs.changed or inputs.bad_gradient >= 0:
            return False
        if self._ballots is None:
            return True
        same = self._settings == self._read_settings() and self._views is self.plan.views.parameters
        return same and self._arrivals.unchanged(self._sent_parameters())

    def _sent_parameters(self) -> set[int]:
        return {index for bucket in self._order[: self._sent] for index in bucket.parameters}

    def _read_settings(self) -> list[Any]:
        """What votes depend on besides gradients, and may be changed between backward and step."""
        settings: list[Any] = [(group[STEP], *group["betas"]) for group in self._owner().param_groups]
        return settings + [state._version for states in self.plan.views.states for state in states.values()]
