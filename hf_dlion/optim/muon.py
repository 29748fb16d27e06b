"""Votes on orthogonalised directions: Distributed Lion whose hidden matrices vote on Muon's direction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from ..bits.counting import popcount
from ..bits.orthogonal import orthogonalize_into
from ..bits.packing import LANES, unpack_bits
from ..wire.exchange import Decision
from .agreement import StepInputs
from .dlion import MOMENTUM, Ballots, DistributedLion, VoteOptions, VotePlan
from .hidden import ORTHOGONAL, UPDATE_RMS, HiddenMatricesMixin, begin_direction
from .layout import Bucket, Segment
from .states import all_parameters
from .tensors import flatten, local, memory_order


@dataclass(frozen=True)
class DirectedBallots(Ballots):
    """What the ballots of one step have in common.

    Attributes:
        directions: flat, by parameter; of hidden matrices, from their first bucket to their last.
        squares: by parameter, the sum of squared levels 2c - n of the decisions so far.
        waiting: buckets that are decided, but have a matrix that is not yet decided as a whole.
    """

    directions: dict[int, Tensor] = field(default_factory=dict)
    squares: dict[int, Tensor] = field(default_factory=dict)
    waiting: list[tuple[Bucket, Decision]] = field(default_factory=list)


class DistributedMuon(HiddenMatricesMixin, DistributedLion):
    """Distributed Lion whose direction is orthogonalised where there is a matrix: one state, one rule, one bit.

    With worker i's momentum m_i and its own, unreduced gradient g_i of a parameter::

        u_i = beta1 * m_i + (1 - beta1) * g_i
        d_i = sign(NS5(u_i)) for hidden matrices, sign(u_i) for the rest      # 1 bit a parameter: what travels
        m_i = beta2 * m_i + (1 - beta2) * g_i
        D   = majority or mean of d_i                                         # aggregation "mavo" or "avg"
        x   = x - lr * (0.2 * D / rms(D) + weight_decay * x) for hidden matrices
        x   = x - lr * (0.2 * D + weight_decay * x)          for the rest

    NS5 is Muon's orthogonalisation (:mod:`hf_dlion.bits.orthogonal`), of each matrix by itself; rms(D) is over the
    elements of a parameter. Each worker orthogonalises its own direction, so what hardware rounds differently changes
    a vote and never a replica. The scale of 0.2 makes ``lr`` mean AdamW's.

    Everything else is as in :class:`DistributedLion`, votes of zero and abstentions included. With one worker, D is
    its sign. Memory beyond parameters, gradients and momentum: the directions of a bucket's matrices in float32, and
    what orthogonalising the largest takes. A matrix whose size is no multiple of 1024 keeps its direction until the
    last bucket of its group.

    Args:
        params: param groups that say which are hidden matrices, as :func:`hidden_matrices` makes them: with
            ``orthogonal``, and ``split`` for weights that are several matrices.
        lr: learning rate, as of AdamW.
        betas: the decays of direction and momentum, of the rest.
        hidden_betas: those of hidden matrices.
        weight_decay: decoupled, as of AdamW.
        aggregation, exchange: as in :class:`DistributedLion`.
        tie: as there; by default ``"alternate"``.
        norm_gradients: as there.
        process_group, on_bad_gradient, check_replicas_steps: as in :class:`hf_dlion.optim.workers.WorkersOptimizer`.

    Raises:
        ValueError: an argument out of its range, no group of hidden matrices, or a parameter there that is none.
    """

    bounded_by_decay = False
    directed = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        hidden_betas: tuple[float, float] = (0.9, 0.95),
        aggregation: str = "mavo",
        tie: str = "alternate",
        exchange: str = "auto",
        **options: Unpack[VoteOptions],
    ) -> None:
        self.hidden_betas = hidden_betas
        super().__init__(
            params, lr, betas, weight_decay, aggregation=aggregation, tie=tie, exchange=exchange, **options
        )
        self.check_hidden()

    @override
    def _vote_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        return () if group[ORTHOGONAL] else super()._vote_states(group)

    @override
    def _ballots(self, plan: VotePlan, ballots: Ballots) -> DirectedBallots:
        return DirectedBallots(ballots.inputs, ballots.hypers, ballots.zero_votes, ballots.voters)

    @override
    def _pack(self, plan: VotePlan, bucket: Bucket, ballots: DirectedBallots) -> Tensor:  # type: ignore[override]
        hidden = [index for index in bucket.parameters if self._is_hidden(plan, index)]
        missing = [index for index in hidden if index not in ballots.directions]
        ballots.directions.update(self._directions(plan, ballots.inputs, missing))
        gradients = list(ballots.inputs.gradients)
        for index in hidden:
            gradients[index] = ballots.directions.get(index)
        words = plan.views.pack(bucket, plan.usable_kernels, gradients, ballots.hypers, ballots.zero_votes)
        for index in hidden:
            if plan.last_bucket[index] == bucket.number:
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
        """A matrix is scaled by the rms of its whole decision, so its buckets wait for the last one of them."""
        for segment in bucket.segments:
            if decision.highest > 1 and self.param_groups[segment.group][ORTHOGONAL]:
                _add_squares(ballots.squares, segment, decision)
        ballots.waiting.append((bucket, decision))
        while ballots.waiting and self._is_decided(plan, *ballots.waiting[0], bucket):
            self._update(plan, *ballots.waiting.pop(0), ballots)

    @override
    def _step_alone(self, plan: VotePlan, inputs: StepInputs, hypers: Sequence[Tensor]) -> None:
        plain = torch.full((1,), UPDATE_RMS, device=plan.views.device)
        hidden = [index for index in range(len(inputs.gradients)) if self._is_hidden(plan, index)]
        for index, gradient in enumerate(inputs.gradients):
            if gradient is not None and not self._is_hidden(plan, index):
                hyper = hypers[plan.group_of[index]]
                plan.views.step_alone(index, plan.kernels, gradient, hyper, inputs.step, plain)
        for index in hidden:  # one at a time, for their memory
            for direction in self._directions(plan, inputs, [index]).values():
                decision = direction.sign()
                scale = _scale(decision.square().sum(dtype=torch.float64), 1, len(decision))
                plan.views.apply_alone(index, decision, hypers[plan.group_of[index]], inputs.step, scale)

    def _is_hidden(self, plan: VotePlan, index: int) -> bool:
        return bool(self.param_groups[plan.group_of[index]][ORTHOGONAL])

    def _directions(self, plan: VotePlan, inputs: StepInputs, indices: Sequence[int]) -> dict[int, Tensor]:
        """The orthogonalised directions of hidden matrices with a gradient, flat; moves their momenta on."""
        parameters = all_parameters(self)
        wholes: dict[int, Tensor] = {}
        matrices, outputs = [], []
        for index in indices:
            gradient = inputs.gradients[index]
            if gradient is None:
                continue
            momentum, group = plan.views.states[index][MOMENTUM], self.param_groups[plan.group_of[index]]
            wholes[index], own, results = begin_direction(local(parameters[index]), gradient.float(), momentum, group)
            matrices += own
            outputs += results
        orthogonalize_into(matrices, outputs)
        return {i: flatten(whole, memory_order(local(parameters[i]))) for i, whole in wholes.items()}

    def _is_decided(self, plan: VotePlan, bucket: Bucket, decision: Decision, latest: Bucket) -> bool:
        """Whether the squares of all hidden matrices in the bucket are known, or need not be."""
        if decision.highest == 1:
            return True
        ends = (plan.last_bucket[index] for index in bucket.parameters if self._is_hidden(plan, index))
        return max(ends, default=0) <= latest.number

    def _update(self, plan: VotePlan, bucket: Bucket, decision: Decision, ballots: DirectedBallots) -> None:
        plain = torch.full((1,), UPDATE_RMS, device=plan.views.device)
        scales = [plain] * len(plan.group_of)
        for index, squares in ballots.squares.items():  # none where all of D is 1 or -1
            scales[index] = _scale(squares, decision.highest, len(plan.views.parameters[index]))
        inputs = ballots.inputs
        kernels, absent = plan.kernels_for(decision), self.agreement.absent
        plan.views.apply(bucket, kernels, decision, ballots.hypers, inputs.step, absent, scales)


def _scale(squares: Tensor, highest: int, elements: int) -> Tensor:
    """0.2 / rms(D), float32 ``[1]``, from the sum of squares of n D; 0.2 where all of D is 0."""
    rms = (squares.double() / elements).sqrt() / highest
    return (UPDATE_RMS / torch.where(rms > 0, rms, 1.0)).float().view(1)


def _add_squares(squares: dict[int, Tensor], segment: Segment, decision: Decision) -> None:
    """The squares of n D = 2c - n of a segment, to those of its parameters; exact, in int64."""
    planes = [plane.view(-1, LANES)[segment.rows] for plane in decision.planes]
    if segment.staged:
        levels = torch.stack([unpack_bits(plane).view(-1).long() << p for p, plane in enumerate(planes)]).sum(0)
        each = (2 * levels - decision.highest) ** 2
        found = [each[place].sum() for place in segment.slices]
    else:
        found = [_squares_of_planes(planes, decision.highest, segment.spans[0].length)]
    for span, sum_of_span in zip(segment.spans, found, strict=True):
        squares[span.parameter] = squares.get(span.parameter, 0) + sum_of_span


def _squares_of_planes(planes: Sequence[Tensor], highest: int, elements: int) -> Tensor:
    """By 4 sum(c^2) - 4 n sum(c) + n^2, with c = sum of 2^p over the planes in which the bit is set."""
    levels, squares = torch.zeros((2,), dtype=torch.int64, device=planes[0].device)
    for p, plane in enumerate(planes):
        levels = levels + (popcount(plane) << p)
        for q, other in enumerate(planes):
            squares = squares + (popcount(plane & other) << (p + q))
    return 4 * squares - 4 * highest * levels + highest**2 * elements
