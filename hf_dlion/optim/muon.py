"""Votes on orthogonalised directions: Distributed Lion whose hidden matrices vote on Muon's direction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from ..bits.devices import send_to
from ..bits.orthogonal import NS_STEPS, orthogonalize_into
from ..wire.collectives import Channel
from ..wire.exchange import Decision
from ..wire.shards import Shards
from .agreement import StepInputs
from .averages import ADAMW_STATES, Averages
from .dlion import MOMENTUM, Ballots, DistributedLion, VoteOptions, VotePlan
from .hidden import ORTHOGONAL, SPLIT, UPDATE_RMS, HiddenMatricesMixin, orthogonalize_directions
from .layout import Bucket
from .sharding import orthogonalize_shards
from .states import all_parameters
from .tensors import local
from .workers import check_known, check_range

RESTS = ("vote", "average")


@dataclass(frozen=True)
class DirectedBallots(Ballots):
    """What the ballots of one step have in common.

    Attributes:
        directions: flat, by parameter; of hidden matrices, from their first bucket to their last.
        squares: by parameter, the sum of squared levels 2c - n of the decisions so far.
        decided: numbers of the buckets that are decided; early votes are in another order than that of the numbers.
        waiting: those of them that have a matrix that is not yet decided as a whole.
        packed: by parameter, in how many buckets its direction was packed.
        undirected: of a sharded replica, the hidden matrices whose directions are still to be made, in order.
    """

    directions: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    decided: set[int] = field(default_factory=set)
    waiting: list[tuple[Bucket, Decision]] = field(default_factory=list)
    packed: dict[int, int] = field(default_factory=dict)
    undirected: list[int] = field(default_factory=list)


class DistributedMuon(HiddenMatricesMixin, DistributedLion):
    """Distributed Lion whose direction is orthogonalised where there is a matrix: one state, one rule, one bit.

    With worker i's momentum m_i and its own, unreduced gradient g_i of a parameter::

        u_i = beta1 * m_i + (1 - beta1) * g_i
        d_i = sign(NS(u_i)) for hidden matrices, sign(u_i) for the rest      # 1 bit a parameter: what travels
        m_i = beta2 * m_i + (1 - beta2) * g_i
        D   = majority or mean of d_i                                         # aggregation "mavo" or "avg"
        x   = x - lr * (0.2 * D / rms(D) + weight_decay * x) for hidden matrices
        x   = x - lr * (0.2 * D + weight_decay * x)          for the rest

    NS is Muon's orthogonalisation (:mod:`hf_dlion.bits.orthogonal`), of each matrix by itself; rms(D) is over the
    elements of a parameter. Each worker orthogonalises its own direction, so what hardware rounds differently changes
    a vote and never a replica. The scale of 0.2 makes ``lr`` mean AdamW's.

    Everything else is as in :class:`DistributedLion`, votes of zero and abstentions included. With one worker, D is
    its sign. Memory beyond parameters, gradients and momentum: the directions of a bucket's matrices in float32, and
    what orthogonalising the largest takes. A matrix whose size is no multiple of 1024 keeps its direction until the
    last bucket of its group.

    With ``rest="average"``, workers send their gradients of the rest, 32 bits a parameter each way, and AdamW steps it
    by their mean. They leave in ``step()``, once all headers are known; votes on hidden matrices are as before. AdamW's
    bias correction counts the steps of the optimizer: a parameter whose first gradient comes late starts with some
    updates that are three to seven times as large.

    The ranks of a sharded replica gather whole matrices in turns, one a rank at a time. Where D can be 0 or is a mean,
    they keep all decisions until they have added up the squares of their shards, a few bits a parameter.

    Args:
        params: param groups that say which are hidden matrices, as :func:`hidden_matrices` makes them: with
            ``orthogonal``, and ``split`` for weights that are several matrices.
        lr: learning rate, as of AdamW.
        betas: the decays of direction and momentum, of the rest; by default 0.9 and 0.99. If it is averaged, those of
            AdamW; by default 0.9 and 0.999.
        eps: of that AdamW; by default 1e-8.
        rest: ``"vote"``, as in Distributed Lion, or ``"average"``.
        hidden_betas: those of hidden matrices.
        ns_steps: of the orthogonalisation: 5, Muon's; or 3, with coefficients for as few, and 0.6 of the operations.
        weight_decay: decoupled, as of AdamW.
        aggregation, exchange: as in :class:`DistributedLion`.
        tie: as there; by default ``"alternate"``.
        norm_gradients: as there, of what is averaged, too.
        process_group, on_bad_gradient, check_replicas_steps: as in :class:`hf_dlion.optim.workers.WorkersOptimizer`.

    Raises:
        ValueError: an argument out of its range, no group of hidden matrices, or a parameter there that is none.
    """

    bounded_by_decay = False

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] | None = None,
        weight_decay: float = 0.0,
        *,
        hidden_betas: tuple[float, float] = (0.9, 0.95),
        ns_steps: int = 5,
        rest: str = "vote",
        eps: float | None = None,
        aggregation: str = "mavo",
        tie: str = "alternate",
        exchange: str = "auto",
        **options: Unpack[VoteOptions],
    ) -> None:
        check_known("rest", rest, RESTS)
        check_known("ns_steps", ns_steps, NS_STEPS)
        self.ns_steps = ns_steps
        self.hidden_betas = hidden_betas
        if rest == "vote" and eps is not None:
            raise ValueError(f"eps={eps} with rest='vote': there is no AdamW. Leave it out, or give rest='average'.")
        self.rest = rest
        self.eps = 1e-8 if eps is None else eps
        if betas is None:
            betas = (0.9, 0.99) if rest == "vote" else (0.9, 0.999)
        super().__init__(
            params, lr, betas, weight_decay, aggregation=aggregation, tie=tie, exchange=exchange, **options
        )
        if self._averages_rest:
            self.state_names = (*ADAMW_STATES, MOMENTUM)
        self.check_hidden()

    @property
    @override
    def method(self) -> str:
        averaged = any(group["params"] and not self._votes_on(group) for group in self.param_groups)
        return f"{super().method}(rest={self.rest!r})" if averaged else super().method

    @override
    def options(self) -> dict[str, Any]:
        # Older checkpoints have no such option.
        return super().options() | ({} if self.ns_steps == 5 else {"ns_steps": self.ns_steps})

    @property
    def _averages_rest(self) -> bool:
        return self.rest == "average"

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self._averages_rest:
            param_group.setdefault("eps", self.eps)
        super().add_param_group(param_group)

    @override
    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if self._averages_rest:
            check_range("eps", group["eps"], "it cannot be negative.")

    @override
    def hyperparameters(self) -> tuple[str, ...]:
        names = super().hyperparameters()
        return (*names, "eps") if self._averages_rest else names

    @override
    def states_of(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        return (MOMENTUM,) if self._votes_on(group) else ADAMW_STATES

    @override
    def _votes_on(self, group: Mapping[str, Any]) -> bool:
        return not self._averages_rest or bool(group[ORTHOGONAL])

    @override
    def _make_plan(self, channel: Channel | None) -> VotePlan:
        plan = super()._make_plan(channel)
        if len(self._voted_parameters()) < len(plan.group_of):
            voted = [self._votes_on(self.param_groups[group]) for group in plan.group_of]
            held = zip(all_parameters(self), voted, strict=True)
            sizes = [0 if votes else local(parameter).numel() for parameter, votes in held]
            plan.averages = Averages(plan.views, sizes, plan.group_of)
        return plan

    @override
    def _vote_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if group[ORTHOGONAL] or not self._votes_on(group) else super()._vote_states(group)

    @override
    def _votes_alone(self, shards: Shards | None) -> bool:
        return shards is None  # else whole matrices are gathered from them

    @override
    def _plain(self, plan: VotePlan, inputs: StepInputs) -> list[Tensor | None]:
        found = enumerate(inputs.gradients)
        return [g if g is not None and self._votes_plainly(plan, index) else None for index, g in found]

    @override
    def _ballots(self, plan: VotePlan, ballots: Ballots) -> DirectedBallots:
        hidden = self._with_gradients(plan, ballots.inputs) if plan.shards else []
        return DirectedBallots(**vars(ballots), undirected=hidden)

    @override
    def _header(self, plan: VotePlan, ballots: Ballots) -> Tensor:
        """Of shards it goes ahead: a rank may raise by it, and no other may wait for its matrices by then.

        Ahead of averages, too, since whoever sums up must know whose gradients count.
        """
        header = super()._header(plan, ballots)
        if plan.exchange is None or (plan.shards is None and plan.averages is None):
            return header
        headers, work = plan.exchange.channel.all_gather(header)
        work.wait()
        ballots.voters(headers)
        return header[:0]

    @override
    def _pack(self, plan: VotePlan, bucket: Bucket, ballots: DirectedBallots) -> Tensor:  # type: ignore[override]
        hidden = [index for index in bucket.parameters if self._is_hidden(plan, index)]
        for indices in self._next(plan, bucket, hidden, ballots):
            ballots.directions.update(self._directions(plan, ballots.inputs, indices, ballots.hypers, ballots.early))
        gradients = self._plain(plan, ballots.inputs)
        for index in hidden:
            gradients[index] = ballots.directions.get(index)
        anew = hidden or ballots.early
        given = plan.views.given(gradients, ballots.inputs.verdict) if anew else ballots.given
        words = plan.views.pack(bucket, given, ballots.hypers, ballots.zero_votes, keep_states=ballots.early)
        for index in hidden:
            ballots.packed[index] = ballots.packed.get(index, 0) + 1
            if ballots.packed[index] == len(plan.buckets_of[index]):
                ballots.directions.pop(index, None)
        return words

    @override
    def _apply(
        self,
        plan: VotePlan,
        bucket: Bucket,
        decision: Decision,
        ballots: DirectedBallots,  # type: ignore[override]
    ) -> None:
        """A matrix is scaled by the rms of its whole decision, so its buckets wait until all of them are decided."""
        if decision.highest > 1:
            for index, square in plan.views.squares(bucket, decision).items():
                ballots.squares[index] = ballots.squares.get(index, 0) + square
        ballots.decided.add(bucket.number)
        ballots.waiting.append((bucket, decision))
        if plan.shards is not None and decision.highest > 1:
            if len(ballots.waiting) < len(plan.buckets):
                return  # each rank of the replica has other buckets: they add up the squares when all are decided
            self._sum_squares(plan, plan.shards, ballots.squares)
        waiting = ballots.waiting.copy()
        ballots.waiting.clear()
        for one in waiting:
            if self._is_decided(plan, *one, ballots.decided):
                self._update(plan, *one, ballots)
            else:
                ballots.waiting.append(one)

    @override
    def _step_alone(self, plan: VotePlan, inputs: StepInputs, hypers: Tensor) -> None:
        hidden = self._with_gradients(plan, inputs)
        rest = [index for index, gradient in enumerate(self._plain(plan, inputs)) if gradient is not None]
        plan.views.step_alone(rest, inputs.gradients, hypers, inputs.step, UPDATE_RMS)
        if plan.averages is not None:
            plan.averages.step_alone(inputs, self.agreement.absent)
        for indices in self._rounds(plan, hidden):
            directions = self._directions(plan, inputs, indices, hypers)
            decisions = {index: direction.sign() for index, direction in directions.items()}
            squares = {index: decision.count_nonzero() for index, decision in decisions.items()}
            if plan.shards is not None:
                self._sum_squares(plan, plan.shards, squares)
            for index, decision in decisions.items():
                scale = _scales([squares[index]], 1, [all_parameters(self)[index].numel()])
                plan.views.apply_alone(index, decision, hypers[plan.group_of[index]], inputs.step, scale)

    def _with_gradients(self, plan: VotePlan, inputs: StepInputs) -> list[int]:
        return [i for i, g in enumerate(inputs.gradients) if g is not None and self._is_hidden(plan, i)]

    def _rounds(self, plan: VotePlan, indices: list[int]) -> Iterator[list[int]]:
        """Of these matrices, those whose directions are made at once: few, for their memory."""
        size = plan.shards.size if plan.shards else 1
        yield from (indices[start : start + size] for start in range(0, len(indices), size))

    def _next(
        self, plan: VotePlan, bucket: Bucket, hidden: Sequence[int], ballots: DirectedBallots
    ) -> Iterator[list[int]]:
        """The matrices whose directions are to be made now, so that the bucket can be packed.

        The ranks of a sharded replica make them together, though each has other buckets. So they do it in one order,
        in rounds of as many as there are shards, and by their last bucket all have taken part in all rounds.
        """
        if plan.shards is None:
            gradients = ballots.inputs.gradients
            yield [index for index in hidden if index not in ballots.directions and gradients[index] is not None]
            return
        last = len(plan.group_of) if bucket is plan.buckets[-1] else max(hidden, default=-1)
        while ballots.undirected and ballots.undirected[0] <= last:
            indices = ballots.undirected[: plan.shards.size]
            del ballots.undirected[: plan.shards.size]
            yield indices

    def _votes_plainly(self, plan: VotePlan, index: int) -> bool:
        group = self.param_groups[plan.group_of[index]]
        return self._votes_on(group) and not group[ORTHOGONAL]

    def _is_hidden(self, plan: VotePlan, index: int) -> bool:
        return bool(self.param_groups[plan.group_of[index]][ORTHOGONAL])

    def _directions(
        self, plan: VotePlan, inputs: StepInputs, indices: Sequence[int], hypers: Tensor, early: bool = False
    ) -> dict[int, Tensor]:
        """The orthogonalised directions of hidden matrices with a gradient, flat; if not early, moves their momenta.

        Of shards, at most as many matrices as there are shards: a collective.
        """
        if not indices:
            return {}
        parameters = all_parameters(self)
        held = plan.views.directions(indices, inputs.gradients, hypers, MOMENTUM, inputs.verdict, keep=early)
        splits = [self.param_groups[plan.group_of[index]][SPLIT] for index in indices]
        orthogonalize = partial(orthogonalize_into, ns_steps=self.ns_steps)
        if plan.shards is not None:
            shapes = [parameters[index].shape for index in indices]
            found = orthogonalize_shards(plan.shards, held, shapes, splits, orthogonalize)
        else:
            wholes = [local(parameters[index]) for index in indices]
            found = orthogonalize_directions(wholes, held, splits, orthogonalize)
        return dict(zip(indices, found, strict=True))

    def _sum_squares(self, plan: VotePlan, shards: Shards, squares: dict[int, Tensor]) -> None:
        """To those of whole matrices; the shards may know of others, since a shard can be empty."""
        zero = torch.zeros((), dtype=torch.int64, device=plan.views.device)
        hidden = [index for index in range(len(plan.group_of)) if self._is_hidden(plan, index)]
        sums = shards.sum(torch.stack([squares.get(index, zero) for index in hidden]))
        squares.update(zip(hidden, sums, strict=True))

    def _is_decided(self, plan: VotePlan, bucket: Bucket, decision: Decision, decided: set[int]) -> bool:
        """Whether the squares of all hidden matrices in the bucket are known, or need not be."""
        if decision.highest == 1:
            return True
        hidden = (index for index in bucket.parameters if self._is_hidden(plan, index))
        return all(decided.issuperset(plan.buckets_of[index]) for index in hidden)

    def _update(self, plan: VotePlan, bucket: Bucket, decision: Decision, ballots: DirectedBallots) -> None:
        plain = torch.full((1,), UPDATE_RMS, dtype=torch.float32, device=plan.views.device)
        scales = [plain] * len(plan.group_of)
        known = [index for index in bucket.parameters if index in ballots.squares]  # none where all of D is 1 or -1
        if known:
            sizes = [all_parameters(self)[index].numel() for index in known]
            found = _scales([ballots.squares[index] for index in known], decision.highest, sizes)
            for place, index in enumerate(known):
                scales[index] = found[place : place + 1]
        plan.views.apply(bucket, decision, ballots.hypers, ballots.inputs.step, self.agreement.absent, scales)


def _scales(squares: Sequence[Tensor], highest: int, elements: Sequence[int]) -> Tensor:
    """0.2 / rms(D) of each parameter, float32, from the sum of squares of n D; 0.2 where all of D is 0."""
    sizes = send_to(squares[0].device, elements, torch.float64)
    rms = (torch.stack(list(squares)).double() / sizes).sqrt() / highest
    return (UPDATE_RMS / torch.where(rms > 0, rms, 1.0)).float()
