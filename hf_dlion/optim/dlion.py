"""Distributed Lion (Liu et al., NeurIPS 2024, arXiv 2404.00438, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from ..bits.devices import can_launch, send_to
from ..bits.kernels import EAGER, Kernels
from ..bits.native import NATIVE_FROM, load_passes
from ..bits.packing import LANES
from ..wire.collectives import Channel, ProcessChannel
from ..wire.conversation import Conversation, side_by_side
from ..wire.exchange import (
    AGGREGATIONS,
    EXCHANGES,
    TIES,
    Ballot,
    Decision,
    Exchange,
    Voters,
    make_exchange,
)
from ..wire.shards import Shards
from ..wire.shares import VoteShares, shares_of
from .agreement import StepInputs
from .averages import Averages
from .launches import LaunchedViews
from .layout import Bucket, buckets_of, fills_several
from .overlap import BUCKETS, EarlyVotes
from .sharding import find_shards, largest_share, lay_out
from .states import all_parameters
from .tensors import device_of_backward, local
from .views import SegmentViews
from .workers import (
    Plan,
    WorkersOptimizer,
    WorkersOptions,
    check_betas,
    check_known,
    replica_of,
)

MOMENTUM = "momentum"


class VoteOptions(WorkersOptions, total=False):
    """Keyword arguments that all votes have; see :class:`DistributedLion`."""

    norm_gradients: bool
    overlap: bool | None


@dataclass(kw_only=True)
class VotePlan(Plan):
    """What stays the same from step to step.

    Attributes:
        views: cut into segments.
        buckets: the layout.
        exchange: of the votes; None for one worker alone.
        group_of: the index of each parameter's group.
        buckets_of: the numbers of the buckets with a part of each parameter.
        overlaps: whether votes can leave during backward.
        averages: of parameters that are not voted on; None, if all are.
    """

    views: SegmentViews
    buckets: Sequence[Bucket]
    exchange: Exchange | None
    group_of: Sequence[int]
    buckets_of: Sequence[Sequence[int]]
    overlaps: bool
    averages: Averages | None = None

    @override
    def settle(self, compiled: bool) -> None:
        super().settle(compiled)
        if not compiled:
            self.views.kernels = EAGER


@dataclass(frozen=True)
class Ballots:
    """What the ballots of one step have in common.

    Attributes:
        inputs: of the step.
        given: the gradients of the step, as the views take them; None, where they are given bucket by bucket.
        hypers: for each param group, as the kernels take it.
        zero_votes: bool ``[32]``, what an exact zero votes, by lane.
        voters: whose votes count.
        early: whether the votes are packed before the step, and momenta are moved on later.
    """

    inputs: StepInputs
    given: Any
    hypers: Tensor
    zero_votes: Tensor
    voters: Voters
    early: bool = False


class DistributedLion(WorkersOptimizer):
    """Lion whose workers send signs: every worker keeps its own momentum, and a vote decides the update.

    With worker i's momentum m_i and its own, unreduced gradient g_i::

        u_i = beta1 * m_i + (1 - beta1) * g_i
        d_i = sign(u_i)                                    # 1 bit a parameter: what travels
        m_i = beta2 * m_i + (1 - beta2) * g_i
        D   = sign(sum_i d_i)  or  (1/N) * sum_i d_i       # aggregation "mavo" or "avg"
        x   = x - lr * (D + weight_decay * x)              # the same on every worker, bit for bit

    The gradients must be each worker's own: under DDP, call :func:`hf_dlion.keep_gradients_local`. With one worker,
    or without a process group, this is Lion (Chen et al., 2023, arXiv 2302.06675).

    One bit cannot say zero, so where a worker's u_i is exactly 0 (a token it never met), or where it has no gradient
    at all, its bit alternates over ranks, steps and elements: such votes cancel. A worker without a gradient for a
    parameter keeps its momentum. A parameter that no worker has a gradient for (``grad`` is None on all: frozen, say)
    is left alone.

    The state is a float32 momentum for each parameter, of whatever dtype; it differs between the workers. bfloat16
    and float16 parameters are updated in float32. An update below half a unit in a bfloat16 parameter's last place
    would be lost, so these are rounded at random, without bias and the same on every rank; float16 to nearest.

    The passes over the parameters are compiled at the first step: on a CPU from C, for 1 million parameters or more,
    if that works on all ranks; on a GPU by Triton. Memory beyond parameters, gradients and momentum is bounded by
    buckets of 16.8 million parameters, 33.6 million on a GPU, and does not grow with the model, except for decisions
    that wait (``overlap``). ``ledger`` counts the bytes that have travelled.

    Parameters may be sharded by FSDP2 over the ranks of a replica, which then is one worker: give ``fully_shard`` the
    shard dimension of a mesh, and the optimizer the group of the other. A rank votes on its shards with the ranks that
    hold the same ones; ``ledger`` has what it sends to them.

    Args:
        params: parameters, named parameters or param groups; dense, real floating point, on one device.
        lr: learning rate; Lion wants 3 to 10 times less than AdamW.
        betas: the decays of direction and momentum, each in [0, 1).
        weight_decay: decoupled; Lion wants 3 to 10 times more than AdamW.
        aggregation: ``"mavo"``, majority vote, or ``"avg"``, averaging.
        tie: what a majority vote of an even number of workers does where it is split: ``"zero"``, D = 0, the paper's
            sign(0); or ``"alternate"``, a sign that alternates over elements and steps, for one bit less on the way
            back.
        exchange: ``"gather"``, everyone counts all votes, (N-1) bits sent per parameter; ``"sharded"``, each rank
            counts its part, (N-1)/N * (1 + bits of the decision); ``"hierarchical"``, on M nodes of L workers, each
            node counts its own first, and (M-1)/L * ceil(log2(L+1)) go to other nodes; ``"auto"``, the one that sends
            less, between nodes where there are several.
        norm_gradients: divide the gradient of each parameter by its root mean square first, in place, so that all steps
            weigh the same in a momentum. Clipping then changes nothing.
        overlap: send votes while backward still computes other gradients, where that changes no bit: for models of
            several buckets, if gradients stay as backward leaves them (what changes them by ``.data`` or numpy is not
            seen, and needs False). Those of FSDP2's shards, too, without ``norm_gradients``. Keeps the decisions of a
            step, a bit or two a parameter, until all are known. None does so on the CPU; True on a GPU as well, for
            replicas that are not sharded. There no other collectives may be called between backward and step, since
            NCCL can block at them, and orthogonalised directions differ in their last bits from those without it.
        process_group, on_bad_gradient, check_replicas_steps: as in :class:`hf_dlion.optim.workers.WorkersOptimizer`.

    Raises:
        ValueError: an argument out of its range; a parameter that is sparse, complex or not dense in memory, or on
            another device than the first.
    """

    bounded_by_decay = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        aggregation: str = "mavo",
        tie: str = "zero",
        exchange: str = "auto",
        norm_gradients: bool = False,
        overlap: bool | None = None,
        **options: Unpack[WorkersOptions],
    ) -> None:
        check_known("aggregation", aggregation, AGGREGATIONS)
        check_known("tie", tie, TIES)
        check_known("exchange", exchange, EXCHANGES)
        self.aggregation = aggregation
        self.tie = tie
        self.exchange = exchange
        self.norm_gradients = norm_gradients
        self.overlap = overlap
        self._early: EarlyVotes | None = None
        self._overlaps = overlap is not False  # until the ranks find that it does not help
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, (), (MOMENTUM,), **options)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_early": None}

    @override
    def vote_shares(self) -> VoteShares | None:
        plan = self._plan
        if not isinstance(plan, VotePlan) or plan.exchange is None or plan.channel is None:
            return None
        return shares_of(plan.exchange, plan.channel, plan.shards)

    @override
    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_betas(group["betas"])

    @override
    def options(self) -> dict[str, Any]:
        options = {"aggregation": self.aggregation, "tie": self.tie, "exchange": self.exchange}
        newer = {"norm_gradients": (self.norm_gradients, False), "overlap": (self.overlap is not False, True)}
        # Older checkpoints have no such options.
        changed = {name: value for name, (value, default) in newer.items() if value != default}
        return super().options() | options | changed

    @override
    def hyperparameters(self) -> tuple[str, ...]:
        return "lr", "betas", "weight_decay"

    @property
    def plan(self) -> VotePlan | None:
        """What stays the same from step to step, as it is now."""
        return self._plan if isinstance(self._plan, VotePlan) else None

    def begin_ballots(self, plan: VotePlan) -> Ballots:
        """Of votes that are packed before the step, and of which all count."""
        nothing = StepInputs(replica_of(self), [], -1)
        return self._begin(plan, nothing, self._hypers(plan), early=True)

    def pack_early(
        self, plan: VotePlan, bucket: Bucket, ballots: Ballots, gradients: Sequence[Tensor | None]
    ) -> Tensor:
        """Own votes on a bucket, from gradients that stay as they are."""
        found = [gradients[index] for index in bucket.parameters]
        if self.norm_gradients:
            parameters = all_parameters(self)
            found = [None if gradient is None else gradient.clone() for gradient in found]
            _norm(found, [parameters[index] for index in bucket.parameters], None)
        ballots.inputs.gradients[:] = [None] * len(gradients)
        for index, gradient in zip(bucket.parameters, found, strict=True):
            ballots.inputs.gradients[index] = gradient
        return self._pack(plan, bucket, ballots)

    @override
    def _take_part(self, gradients: list[Tensor | None], *scaler: Tensor | None) -> None:
        if self._early is not None:
            self.agreement.known_finite.good = self._early.good_gradients()
        super()._take_part(gradients, *scaler)

    @override
    def _decide(self, plan: VotePlan, inputs: StepInputs) -> None:
        early = self._early
        if early is not None and not early.agreed:
            early.look()
        decisions = early.finish(inputs) if early is not None and early.under_way else None
        if early is not None and decisions is not None:
            self._apply_all(plan, inputs, decisions, early.channel_beside)
        else:
            super()._decide(plan, inputs)
        if early is not None and early.plan is plan:
            early.next_step()
            if early.closed:  # on all ranks alike: they lay out anew, in fewer buckets
                self._early, self._overlaps = None, False
                self._lay_out_anew(plan)
            return
        if early is not None:
            early.close()
        self._early = None
        if plan.overlaps and plan.exchange is not None and isinstance(plan.channel, ProcessChannel):
            self._early = EarlyVotes(self, plan, plan.exchange, plan.channel, early)

    def _lay_out_anew(self, old: VotePlan) -> None:
        self.state_changed()
        self._current_plan()
        assert self.plan is not None
        assert self.plan.exchange is not None
        assert old.exchange is not None
        self.plan.exchange.statistics = old.exchange.statistics

    def _apply_all(
        self, plan: VotePlan, inputs: StepInputs, decisions: Iterable[tuple[Bucket, Decision]], channel: Channel
    ) -> None:
        """A step whose votes are being decided, and have not moved the momenta."""
        hypers = self._hypers(plan)
        if self.norm_gradients:
            _norm(inputs.gradients, all_parameters(self), plan.shards)
        plan.views.move(inputs.gradients, hypers, MOMENTUM)
        ballots = self._begin(plan, inputs, hypers)
        side_by_side(self._beside_votes(plan, inputs, channel))
        for bucket, decision in decisions:
            self._apply(plan, bucket, decision, ballots)

    @override
    def _conversations(self, plan: VotePlan, inputs: StepInputs) -> Iterator[Conversation[None]]:
        hypers = self._hypers(plan)
        if self.norm_gradients:
            _norm(inputs.gradients, all_parameters(self), plan.shards)
        if plan.exchange is None:  # nothing to say
            self._step_alone(plan, inputs, hypers)
            return
        ballots = self._begin(plan, inputs, hypers)
        header = self._header(plan, ballots)
        yield from self._beside_votes(plan, inputs, plan.exchange.channel)
        for bucket in plan.buckets:
            yield self._vote(plan, plan.exchange, bucket, ballots, header)
            header = header[:0]  # it travels with the first

    def _header(self, plan: VotePlan, ballots: Ballots) -> Tensor:
        """What travels with the first bucket."""
        return self.agreement.header(ballots.inputs)

    def _beside_votes(self, plan: VotePlan, inputs: StepInputs, channel: Channel) -> Iterable[Conversation[None]]:
        """What else is exchanged in a step: the voters are known."""
        if plan.averages is None:
            return ()
        return plan.averages.conversations(channel, inputs, self.agreement.voting, self.agreement.absent)

    def _vote(
        self, plan: VotePlan, exchange: Exchange, bucket: Bucket, ballots: Ballots, header: Tensor
    ) -> Conversation[None]:
        """One bucket's way through a step."""
        if ballots.inputs.changed:  # they are of no meaning, and the header says so
            words = torch.zeros(bucket.blocks * LANES, dtype=torch.int32, device=plan.views.device)
        else:
            words = self._pack(plan, bucket, ballots)
        # A model that has moved has its header on another device.
        ballot = Ballot(words, header.to(words.device), ballots.inputs.step, bucket.padding)
        decision = yield from exchange.decide(ballot, ballots.voters)
        if decision is not None:
            self._apply(plan, bucket, decision, ballots)

    def _hypers(self, plan: VotePlan) -> Tensor:
        """Float32 ``[groups, 6]``, as the kernels take them."""
        rows = []
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            rows.append([beta1, 1 - beta1, beta2, 1 - beta2, float(group["lr"]), group["weight_decay"]])
        return send_to(plan.views.device, rows, torch.float32)

    def _begin(self, plan: VotePlan, inputs: StepInputs, hypers: Tensor, early: bool = False) -> Ballots:
        lanes = torch.arange(LANES, device=plan.views.device)
        zero_votes = ((lanes + self.rank + inputs.step) & 1).bool()
        channel = plan.channel
        assert channel is not None
        voters = partial(self.agreement.voters, channel, inputs.replica)
        given = None if early else plan.views.given(self._plain(plan, inputs), inputs.verdict)
        return self._ballots(plan, Ballots(inputs, given, hypers, zero_votes, voters, early))

    def _plain(self, plan: VotePlan, inputs: StepInputs) -> list[Tensor | None]:
        """The gradients that vote as they are; None in place of others."""
        return inputs.gradients

    def _ballots(self, plan: VotePlan, ballots: Ballots) -> Ballots:
        """With what else this method's ballots have in common."""
        return ballots

    def _pack(self, plan: VotePlan, bucket: Bucket, ballots: Ballots) -> Tensor:
        given = plan.views.given(ballots.inputs.gradients, None) if ballots.early else ballots.given
        return plan.views.pack(bucket, given, ballots.hypers, ballots.zero_votes, keep_states=ballots.early)

    def _apply(self, plan: VotePlan, bucket: Bucket, decision: Decision, ballots: Ballots) -> None:
        plan.views.apply(bucket, decision, ballots.hypers, ballots.inputs.step, self.agreement.absent)

    def _step_alone(self, plan: VotePlan, inputs: StepInputs, hypers: Tensor) -> None:
        """The update of one worker alone; a parameter without a gradient is left alone."""
        present = [index for index, gradient in enumerate(inputs.gradients) if gradient is not None]
        plan.views.step_alone(present, inputs.gradients, hypers, inputs.step)

    @override
    def _make_plan(self, channel: Channel | None) -> VotePlan:
        shards = find_shards(all_parameters(self), self.process_group)
        parameters = [local(parameter) for parameter in all_parameters(self)]
        device, workers = parameters[0].device, channel.size if channel else 1
        group_of = [index for index, group in enumerate(self.param_groups) for _ in group["params"]]
        voted = [self._votes_on(group) for group in self.param_groups]
        elements = sum(p.numel() for p, group in zip(parameters, group_of, strict=True) if voted[group])
        exchange = None
        if channel is not None:
            exchange = make_exchange(self.exchange, channel, elements // 32, self.aggregation, self.tie, device)
        overlaps = self._can_overlap(device, shards) and isinstance(channel, ProcessChannel)
        count = BUCKETS if overlaps else exchange.buckets if exchange else 1
        buckets = lay_out(self.param_groups, voted, shards, count)
        kernels = make_kernels(elements, device)
        views = self._make_views(buckets, device, group_of, kernels or EAGER)
        return VotePlan(
            workers=workers,
            channel=channel,
            views=views,
            defers_verdict=isinstance(views, LaunchedViews) and channel is not None and shards is None,
            compiled=kernels is not None,
            shards=shards,
            buckets=buckets,
            exchange=exchange,
            group_of=group_of,
            buckets_of=buckets_of(buckets, len(parameters)),
            overlaps=overlaps and fills_several(largest_share(self._voted_parameters(), shards)),
        )

    def _votes_on(self, group: Mapping[str, Any]) -> bool:
        """Whether workers vote on a group's parameters."""
        return True

    def _voted_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups if self._votes_on(group) for parameter in group["params"]]

    def _can_overlap(self, device: torch.device, shards: Shards | None) -> bool:
        if device_of_backward(all_parameters(self)[0]) == "cpu":
            return self._overlaps and self._votes_alone(shards)
        return self._overlaps and self.overlap is True and can_launch(device) and shards is None

    def _votes_alone(self, shards: Shards | None) -> bool:
        """Whether votes on a shard need nothing of the other shards of their replica."""
        return shards is None or not self.norm_gradients

    def _make_views(
        self, buckets: Sequence[Bucket], device: torch.device, group_of: Sequence[int], kernels: Kernels
    ) -> SegmentViews:
        state_names = [self._vote_states(group) for group in self.param_groups]
        if can_launch(device):
            return LaunchedViews(buckets, state_names, device, group_of, MOMENTUM)
        return SegmentViews(buckets, state_names, device, group_of, kernels)

    def _vote_states(self, group: dict[str, Any]) -> tuple[str, ...]:
        """What the vote of a group's parameters reads and changes; none, where its direction is given."""
        return (MOMENTUM,)


def make_kernels(elements: int, device: torch.device) -> Kernels | None:
    """In C, if that pays for so many parameters, and works."""
    return load_passes() if device.type == "cpu" and elements >= NATIVE_FROM else None


def _norm(gradients: Sequence[Tensor | None], parameters: Sequence[Tensor], shards: Shards | None) -> None:
    """Divide each by its root mean square, in place; zeros stay. Of shards, by that of the whole gradient."""
    zero = torch.zeros((), dtype=torch.float32, device=local(parameters[0]).device)
    # Zeros for those without, too: all shards have as many, whatever became of the parameters of one of them.
    norms = torch.stack([zero if g is None else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
    if shards is not None:
        norms = shards.sum(norms.square()).sqrt()
    for index, (gradient, norm) in enumerate(zip(gradients, norms, strict=True)):
        if gradient is not None:  # else there may be other parameters by now
            rms = norm / max(parameters[index].numel(), 1) ** 0.5
            gradient.div_(torch.where(rms > 0, rms, 1.0))
