"""Votes on gradients: what one worker sends of a bucket, and what becomes of it. Any optimizer may stand behind.

Nothing is kept from step to step but counters, so there is nothing to save.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..bits.devices import can_launch, send_to
from ..bits.dither import EAGER, WIDTH, Passes
from ..bits.hashing import digest
from ..bits.native import NATIVE_FROM, load_dither
from ..wire.conversation import Conversation, run
from ..wire.exchange import (
    AGGREGATIONS,
    EXCHANGES,
    Ballot,
    Decision,
    Exchange,
    VoteStatistics,
    make_exchange,
)
from ..wire.groups import Group, group_size, make_channel, rank_in
from ..wire.ledger import Ledger
from ..wire.local import LocalGroup, LocalWorker
from ..wire.shares import VoteShares, shares_of
from .agreement import ON_BAD_GRADIENT
from .tensors import as_laid_out, flatten, memory_order
from .workers import check_known

logger = logging.getLogger(__name__)

_BUCKET = 25 << 20  # bytes, as DDP's
_MOST_UNHEARD = 64 << 20  # bytes of votes
_ABSENT = -1.0  # the size of a gradient that a worker does not have


_Voters = Callable[[Tensor, Sequence[tuple[int, int]]], list[int]]


@dataclass(frozen=True)
class _Bucket:
    """That all workers have decided, abstaining or not.

    Attributes:
        flat, parts: as of :meth:`SignedGradients.vote`.
        ballot: this worker's.
        everyone: their rms, float32 ``[N, parts]``.
    """

    flat: Tensor
    parts: Sequence[tuple[int, int]]
    ballot: Ballot
    everyone: Tensor


@dataclass
class Unheard:
    """Buckets of a step that are decided before this worker knows who abstains, so that a GPU is not waited for.

    Attributes:
        decided: those.
        nbytes: of their votes.
        statistics: as they were before the step.
        abstained: whether a worker has, as far as it is known.
    """

    decided: list[_Bucket] = field(default_factory=list)
    nbytes: int = 0
    statistics: VoteStatistics | None = None
    abstained: bool = False


class SignedGradients:
    """A worker's part in votes on gradients.

    Of worker i's gradient g_i::

        s_i = sign(g_i + 2 rms(g_i) n_i)               # n_i uniform in [-1, 1]: 1 bit a parameter, what travels
        g   = (1/N) * sum_i s_i  or  sign(sum_i s_i)   # aggregation "avg" or "mavo": the same on every worker

    The rms is that of each parameter's gradient. The noise is a hash of step, worker, parameter and place: the same in
    every run. Where a gradient is exactly 0, its votes alternate over workers, steps and elements, and cancel; if all
    of a parameter's gradient is 0 on all workers, so is the decision. For that, and to find a NaN or Inf, 4 bytes a
    parameter tensor travel beside the votes.

    All steps weigh the same then, whatever the size of their gradients. That suits an optimizer that is free of scale:
    Adam and its 8-bit kin, Muon, Lion.

    Args:
        parameters: that have gradients, in the same order on all workers, on one device; of a sharded replica, what
            this rank holds of them.
        names: of these, for errors.
        group: the workers; of sharded replicas, the ranks that hold the same shards.
        aggregation: ``"avg"`` or ``"mavo"``; a split vote of an even number is 0.
        dither: whether there is noise; without it s_i is the sign of g_i.
        exchange: as of :class:`hf_dlion.DistributedLion`.
        on_bad_gradient: what becomes of a bucket in which a worker's gradient has a NaN or Inf (or values whose squares
            overflow): ``"abstain"``, that worker has no vote on it; or ``"raise"``, all ranks raise.
        shard: the number of the shard that this rank holds of its replica. Each shard has noise of its own.
        scaler: of the gradients. With one that is enabled, such a bucket is NaN on all ranks, so that all skip the step
            and lower their scales; what is decided is multiplied by the scale, which is taken off again.

    Attributes:
        ledger: what this worker has sent and received.
        step: the number of the next step.
        bad_gradients: workers left out of a step, in a bucket at least, over all steps.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str],
        group: Group = None,
        *,
        aggregation: str = "avg",
        dither: bool = True,
        exchange: str = "auto",
        on_bad_gradient: str = "abstain",
        shard: int = 0,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        check_options(aggregation, exchange, on_bad_gradient)
        self.names = names
        self.workers, self.rank = group_size(group), rank_in(group)
        self._source_of_noise = self.rank + self.workers * shard
        self.dither = dither
        self.on_bad_gradient = on_bad_gradient
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.ledger = Ledger()
        self.step = 0
        self.bad_gradients = 0
        self._bad: set[int] = set()
        self._device = parameters[0].device
        elements = sum(parameter.numel() for parameter in parameters)
        self._passes = _fastest_passes(self._device, elements)
        channel = make_channel(group, self.ledger)
        self._exchange: Exchange | None = None
        if channel is not None:
            self._exchange = make_exchange(exchange, channel, elements // 32, aggregation, "zero", self._device)

    def vote(
        self,
        flat: Tensor,
        parts: Sequence[tuple[int, int]],
        absent: Sequence[int] = (),
        unheard: Unheard | None = None,
    ) -> Conversation[Tensor]:
        """Replace the gradients of a bucket by what the workers decide. A conversation of all of them.

        Args:
            flat: this worker's gradients, one after the other, ``[E]``; overwritten.
            parts: of each, the index of its parameter and how many elements it has.
            absent: the parts that this worker has no gradient of, and zeros in its place.
            unheard: of the step: all votes count at first, and :meth:`end_step` corrects in ``flat`` what was decided;
                None waits to know who votes.

        Returns:
            Bool ``[parts]``, whether any worker has a gradient.

        Raises:
            FloatingPointError: of ``on_bad_gradient``, or all workers would abstain; on all ranks.
        """
        sizes = [size for _, size in parts]
        if not len(flat):
            return torch.ones(len(parts), dtype=torch.bool, device=flat.device)
        rms = _rms(flat, sizes)
        for place in absent:
            rms[place] = _ABSENT
        seeds = [digest((self.step, self._source_of_noise, index)) & 0x7FFFFFFF for index, _ in parts]
        widths = WIDTH * rms if self.dither else None
        words = self._passes.pack(flat, sizes, seeds, widths, self.rank + self.step)
        ballot = Ballot(words, rms.view(torch.int32), self.step, 1 - len(flat) / (32 * len(words)))
        if unheard is not None and unheard.statistics is None and self._exchange is not None:
            unheard.statistics = self._exchange.statistics.copy()
        everyone = yield from self._decide(flat, parts, ballot, self._voters if unheard is None else self._all)
        if unheard is not None:
            unheard.decided.append(_Bucket(flat, parts, ballot, everyone))
            unheard.nbytes += words.nbytes
            if unheard.nbytes > _MOST_UNHEARD:
                self._hear(unheard)
        return (everyone != _ABSENT).any(0)

    def _hear(self, unheard: Unheard) -> None:
        """Vote again on buckets of which a worker abstains; the same ones on all ranks."""
        decided, unheard.decided, unheard.nbytes = unheard.decided, [], 0
        if not decided:
            return
        finite = torch.cat([bucket.everyone.isfinite() for bucket in decided], 1).cpu()
        for found, bucket in zip(finite.split([len(one.parts) for one in decided], 1), decided, strict=True):
            if not bool(found.all()):
                unheard.abstained = True
                run(self._decide(bucket.flat, bucket.parts, bucket.ballot, self._voters))

    def _decide(
        self, flat: Tensor, parts: Sequence[tuple[int, int]], ballot: Ballot, voters: _Voters
    ) -> Conversation[Tensor]:
        """Send a ballot, and put into the bucket what those decide that do not abstain; everyone's rms."""
        everyone, counted = ballot.header.view(torch.float32).unsqueeze(0), [0]

        def who_counts(headers: Tensor) -> Sequence[int]:
            nonlocal everyone, counted
            everyone = headers.view(torch.float32).clone()  # a view would keep everyone's words
            counted = voters(everyone, parts)
            return counted

        decision: Decision | None = Decision((ballot.words,), 1)
        if self._exchange is None:
            voters(everyone, parts)
        else:
            decision = yield from self._exchange.decide(ballot, who_counts)
        assert decision is not None  # somebody votes, or everybody has raised
        largest = (everyone if len(counted) == len(everyone) else everyone[counted]).amax(0)
        scales = largest * 0 + (largest > 0)  # 1; 0 where all are 0; NaN where one is not finite
        if self.scaler is not None:
            scales = self.scaler.scale(scales)
        self._passes.settle(flat, [size for _, size in parts], scales, decision.highest, decision.planes)
        return everyone

    def end_step(self, unheard: Unheard | None = None) -> None:
        """All buckets of a step have been voted on. A collective if some are unheard.

        Raises:
            FloatingPointError: as :meth:`vote`.
        """
        if unheard is not None:
            self._hear(unheard)
            if unheard.abstained and self._exchange is not None and unheard.statistics is not None:
                self._exchange.statistics = unheard.statistics  # which leave such a step out
        self.bad_gradients += len(self._bad)
        self._bad = set()
        self.step += 1
        self.ledger.steps += 1

    def vote_shares(self) -> VoteShares | None:
        """How the votes went since the last call. A collective over the workers; None for one alone."""
        exchange = self._exchange
        return None if exchange is None else shares_of(exchange, exchange.channel)

    def _all(self, everyone: Tensor, parts: Sequence[tuple[int, int]]) -> list[int]:
        return list(range(len(everyone)))

    def _voters(self, everyone: Tensor, parts: Sequence[tuple[int, int]]) -> list[int]:
        """The ranks that do not abstain, by everyone's rms, ``[N, parts]``."""
        if self.scaler is not None:  # it looks itself
            return self._all(everyone, parts)
        finite = everyone.isfinite().tolist()
        bad = {rank: row.index(False) for rank, row in enumerate(finite) if not all(row)}
        if bad and (self.on_bad_gradient == "raise" or len(bad) == len(finite)):
            rank, place = next(iter(bad.items()))
            raise FloatingPointError(f"rank {rank}: {self._describe(parts[place][0])}")
        if self.rank in bad and self.rank not in self._bad:
            logger.warning("worker %d abstains: %s", self.rank, self._describe(parts[bad[self.rank]][0]))
        self._bad |= bad.keys()
        return [rank for rank in range(len(finite)) if rank not in bad]

    def _describe(self, index: int) -> str:
        return (
            f"the gradient of {self.names[index]} has a NaN or Inf at step {self.step}. Look for a too large learning "
            "rate, a division by zero in the loss, or a batch without targets."
        )


class VirtualGradients:
    """Workers inside one process that take turns with a model, and vote on its gradients: one or several.

    ::

        votes = VirtualGradients(model.parameters(), 8)
        for batch in eight_batches:
            loss(model, batch).backward()
            votes.take_turn(rank)      # takes the gradients as this worker's, and clears them
        votes.decide()                 # and now they are what the workers decided
        optimizer.step()

    The gradients are bit for bit those of N processes.

    Args:
        named_parameters: of the model; those that need no gradient are left out.
        workers: N.
        options: as of :class:`SignedGradients`.

    Attributes:
        members: the workers.
    """

    def __init__(self, named_parameters: Iterator[tuple[str, Tensor]], workers: int, **options: Any) -> None:
        trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
        self.parameters = [parameter for _, parameter in trained]
        names = [name for name, _ in trained]
        self._group = LocalGroup(workers)
        groups = [LocalWorker(self._group, rank) if workers > 1 else None for rank in range(workers)]

        def member(rank: int) -> SignedGradients:
            return SignedGradients(self.parameters, names, groups[rank], **options)

        self.members = self._group.run(member)
        self._turns: list[list[Tensor | None]] = [[None] * len(self.parameters) for _ in range(workers)]

    @torch.no_grad()
    def take_turn(self, rank: int) -> None:
        """Take the gradients, after a backward, as those of this worker, added to those it has, and clear them."""
        for index, parameter in enumerate(self.parameters):
            before, new = self._turns[rank][index], parameter.grad
            self._turns[rank][index] = new if before is None else before if new is None else before.add_(new)
            parameter.grad = None

    @torch.no_grad()
    def decide(self) -> None:
        """Give each parameter that a worker has a gradient for what the workers decide."""
        turns = self._turns
        self.forget_turns()  # should there be an error
        voted = [i for i in range(len(self.parameters)) if any(turn[i] is not None for turn in turns)]
        for bucket in in_buckets(voted, self.parameters):
            of_workers = [self._flat(turn, bucket) for turn in turns]
            parts = [(index, self.parameters[index].numel()) for index in bucket]
            self._group.run(lambda rank: run(self.members[rank].vote(of_workers[rank], parts)))  # noqa: B023
            pieces = of_workers[0].split([size for _, size in parts])
            for (index, _), decided in zip(parts, pieces, strict=True):
                parameter = self.parameters[index]
                parameter.grad = as_laid_out(decided.clone(), parameter.shape, memory_order(parameter))
        for member in self.members:
            member.end_step()

    @property
    def workers(self) -> int:
        """N."""
        return len(self.members)

    @property
    def ledger(self) -> Ledger:
        """What the first worker would have sent and received."""
        return self.members[0].ledger

    @property
    def bad_gradients(self) -> int:
        """As of :class:`SignedGradients`."""
        return self.members[0].bad_gradients

    @property
    def step(self) -> int:
        """The number of the next step."""
        return self.members[0].step

    @step.setter
    def step(self, number: int) -> None:
        for member in self.members:
            member.step = number

    def vote_shares(self) -> VoteShares | None:
        """As :meth:`SignedGradients.vote_shares`."""
        return self._group.run(lambda rank: self.members[rank].vote_shares())[0]

    def forget_turns(self) -> None:
        """Drop the gradients taken since the last decision."""
        self._turns = [[None] * len(self.parameters) for _ in self._turns]

    def _flat(self, turn: Sequence[Tensor | None], bucket: Sequence[int]) -> Tensor:
        gradients = []
        for index in bucket:
            parameter, gradient = self.parameters[index], turn[index]
            given = torch.zeros_like(parameter) if gradient is None else gradient
            gradients.append(flatten(given, memory_order(parameter)))
        return torch.cat(gradients)


def check_options(aggregation: str, exchange: str, on_bad_gradient: str) -> None:
    """Raise ValueError unless the options of :class:`SignedGradients` are of those known."""
    check_known("aggregation", aggregation, AGGREGATIONS)
    check_known("exchange", exchange, EXCHANGES)
    check_known("on_bad_gradient", on_bad_gradient, ON_BAD_GRADIENT)


def in_buckets(indices: Iterable[int], tensors: Sequence[Tensor]) -> Iterator[list[int]]:
    """Indices of tensors whose gradients are voted on together: consecutive ones, of one dtype, 25 MiB at most."""
    bucket: list[int] = []
    size = 0
    for index in indices:
        tensor = tensors[index]
        if bucket and (size + tensor.nbytes > _BUCKET or tensor.dtype != tensors[bucket[0]].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(index)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _fastest_passes(device: torch.device, elements: int) -> Passes:
    if can_launch(device):
        from ..bits.gpu import DITHER

        return DITHER
    native = load_dither() if device.type == "cpu" and elements >= NATIVE_FROM else None
    return native or EAGER


def _rms(flat: Tensor, sizes: Sequence[int]) -> Tensor:
    """Of each part, float32; NaN or Inf if it has one."""
    parts = flat.split(list(sizes))
    if flat.dtype == torch.float64:
        norms = [torch.linalg.vector_norm(part.float()) for part in parts]
    else:
        norms = list(torch._foreach_norm(parts, 2, dtype=torch.float32))
    return torch.stack(norms) / send_to(flat.device, [max(size, 1) ** 0.5 for size in sizes], torch.float32)
