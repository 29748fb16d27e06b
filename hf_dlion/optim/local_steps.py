"""Local steps: each worker steps by itself, and every H steps the workers vote on how far they have come.

After DiLoCo (Douillard et al., 2023, arXiv 2311.08105), whose workers average what they have moved by, and methods that
vote on it (Yu et al., 2024, arXiv 2411.17866).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from ..bits.packing import BLOCK, LANES, pack_bits, unpack_bits
from ..wire.collectives import Channel
from ..wire.conversation import Conversation, run
from ..wire.exchange import AGGREGATIONS, EXCHANGES, TIES, Ballot, Exchange, make_exchange
from ..wire.groups import alone
from ..wire.sums import sum_dense
from .agreement import StepInputs
from .layout import Span
from .mean_gradient import CodedMean, MeanPlan, Share
from .replica import STEP
from .rules import RULES
from .states import all_parameters
from .tensors import float32_state, laid_out_state, local, local_gradient
from .workers import VoteShares, WorkersOptions, check_known, check_range, members_of, replica_of, shares_of

OUTER_AGGREGATIONS = (*AGGREGATIONS, "mean")

SCALED = 256
"""Elements that share a scale."""

ANCHOR, BUFFER, OWN = "anchor", "momentum_buffer", "parameter"
SINCE, OUTER_LR, OUTER_MOMENTUM = "steps_since_vote", "outer_lr", "outer_momentum"

_COMPARED = ("lr", "weight_decay", "betas", "momentum", "eps")


@dataclass(kw_only=True)
class LocalPlan(MeanPlan):
    """What stays the same from round to round.

    Attributes:
        exchange: of the votes; None for one worker alone, or where displacements are averaged.
    """

    exchange: Exchange | None


class LocalSteps(CodedMean):
    """Lets an optimizer step on each worker alone; every so many steps the workers vote on their displacements.

    With the parameters x_0 of the last vote, those x_i that worker i has come to since, and an outer momentum m::

        d_i = x_0 - x_i                                        # after `every` steps of the inner optimizer
        D   = majority or mean of sign(d_i)                    # 1 bit a parameter: what travels
        s   = mean over the workers and 256 elements of |d_i|  # 32 bits for 256 parameters
        m   = outer_momentum * m + s D
        x_0 = x_0 - outer_lr * (s D + outer_momentum * m)      # without nesterov: outer_lr * m
        x_i = x_0                                              # the same on every worker, bit for bit

    With ``aggregation="mean"``, s D is the mean of the d_i themselves, 32 bits: DiLoCo, with an inner AdamW.

    ::

        inner = torch.optim.AdamW(model.parameters(), lr=1e-3)
        optimizer = LocalSteps(inner, every=16)

    The inner optimizer's param groups are this one's, so schedulers count its steps and set its learning rates. Its
    state stays on the worker. One of this package steps without votes: on each worker's gradient alone.

    A parameter that a worker has not moved votes zero, by bits that alternate; one that no worker has moved is left
    alone. A worker whose gradient has a NaN or Inf leaves that inner step out; it abstains from the vote if it has made
    no other since the last, or where a displacement is not finite. With ``on_bad_gradient="raise"``, all ranks raise at
    the next vote.

    Between votes, the parameters differ from worker to worker. :meth:`voted_parameters` gives the model those of the
    last vote for a while, and :meth:`vote` ends a round before its time. After an error in a vote, the parameters are
    x_0. Memory beyond the inner optimizer: x_0 and m in float32, and displacements while the workers vote.

    Args:
        inner: any optimizer whose state is per parameter, for dense parameters that are not sharded.
        every: H, inner steps from one vote to the next.
        outer_lr: learning rate of the outer rule.
        outer_momentum: its momentum, in [0, 1).
        nesterov: whether that is Nesterov's.
        aggregation: ``"mavo"``, ``"avg"`` or ``"mean"``.
        tie, exchange: of the votes, as in :class:`hf_dlion.DistributedLion`; here ties alternate by default.
        process_group: the workers; if it is not given, those of the inner optimizer, if it is of this package.
        on_bad_gradient: as above.
        check_replicas_steps: as in :class:`hf_dlion.optim.workers.WorkersOptimizer`, rounded up to whole rounds.

    Raises:
        ValueError: an argument out of its range; an inner optimizer of several workers in one process, or one that has
            local steps itself.
    """

    inner: Optimizer

    def __init__(
        self,
        inner: Optimizer,
        *,
        every: int,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        aggregation: str = "mavo",
        tie: str = "alternate",
        exchange: str = "auto",
        **options: Unpack[WorkersOptions],
    ) -> None:
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r}: it is a number of steps, at least 1.")
        check_known("aggregation", aggregation, OUTER_AGGREGATIONS)
        check_known("tie", tie, TIES)
        check_known("exchange", exchange, EXCHANGES)
        self.inner, self.every, self.nesterov = inner, every, nesterov
        self.aggregation, self.tie, self.exchange = aggregation, tie, exchange
        self._bad_gradient = -1
        members = members_of(inner)
        if len(members) > 1 or any(member.inner is not None for member in members):
            raise ValueError(
                f"LocalSteps around a {type(inner).__name__}: its inner optimizer is that of one worker, without local "
                "steps of its own. Virtual workers are made around it: VirtualWorkers(params, N, method), whose method "
                "makes a LocalSteps."
            )
        if callable(getattr(inner, "train", None)):
            raise ValueError(
                f"LocalSteps around a {type(inner).__name__}: its parameters are others for training than for "
                "evaluation, and a vote is on one. Take an inner optimizer without schedule-free averages."
            )
        for member in members:
            options.setdefault("process_group", member.process_group)
            member.process_group = alone()
            member.state_changed()
        outer = {OUTER_LR: outer_lr, OUTER_MOMENTUM: outer_momentum, SINCE: 0}
        options["check_replicas_steps"] = _whole_rounds(options.get("check_replicas_steps", 100), every)
        super().__init__(inner.param_groups, outer, (ANCHOR, BUFFER), (OWN,), **options)
        self.state_names = (ANCHOR, BUFFER)  # what is the worker's own is its parameters, which are no state
        self.param_groups = inner.param_groups

    @property
    @override
    def method(self) -> str:
        return f"LocalSteps({type(self.inner).__name__})"

    @property
    def between_votes(self) -> bool:  # type: ignore[override]
        """Whether the parameters are this worker's own now, and not those of all."""
        return any(group[SINCE] for group in self.param_groups)

    @override
    def vote_shares(self) -> VoteShares | None:
        plan = self._plan
        if not isinstance(plan, LocalPlan) or plan.exchange is None:
            return None
        return shares_of(plan.exchange, plan.shards)

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups is self.inner.param_groups:  # not so while this is made
            self.inner.add_param_group(param_group)
            param_group = self.param_groups.pop()
            param_group[SINCE] = self.param_groups[0][SINCE]
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """An inner step; every ``every`` steps then a vote, which is a collective over the workers.

        So is the first step. Arguments and errors as of :meth:`WorkersOptimizer.step`; those of an exchange come at a
        vote.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [local_gradient(parameter, self.method) for parameter in all_parameters(self)]
        gradients, bad = self.agreement.own_gradients(gradients, replica_of(self), self.rank, *self._scaler())
        self._begin(gradients)
        made = self.param_groups[0][STEP] + 1
        if bad < 0:
            self.inner.step()
        else:
            self._bad_gradient = bad
        for group in self.param_groups:
            group[STEP] = made  # the inner one may count there, too
            group[SINCE] += 1
        self.ledger.steps += 1
        if made % self.every == 0:
            self.vote()
        return loss

    @override
    @torch.no_grad()
    def vote(self) -> None:
        """Vote on the steps made since the last vote, if there are any. A collective over the workers."""
        if not self.between_votes:
            return
        displacements = self._displacements()
        for group in self.param_groups:
            group[SINCE] = 0
        for parameter in all_parameters(self):
            local(parameter).copy_(self.state[parameter][ANCHOR])
        overflow = torch.zeros(()) if self.agreement.scaled else None  # with a scaler, all may abstain
        self._take_part(displacements, None, overflow)

    @override
    @contextmanager
    def voted_parameters(self) -> Iterator[None]:
        between = self.between_votes
        own = [local(parameter).detach().clone() for parameter in all_parameters(self)] if between else []
        with torch.no_grad():
            for parameter, _ in zip(all_parameters(self), own, strict=False):
                local(parameter).copy_(self.state[parameter][ANCHOR])
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(all_parameters(self), own, strict=False):
                    local(parameter).copy_(before)

    @override
    def check_group(self, group: dict[str, Any]) -> None:
        check_range(OUTER_LR, group[OUTER_LR], "it cannot be negative.")
        check_range(OUTER_MOMENTUM, group[OUTER_MOMENTUM], "it is a decay, at least 0 and less than 1.", below=1)

    @override
    def options(self) -> dict[str, Any]:
        votes = {} if self.aggregation == "mean" else {"tie": self.tie, "exchange": self.exchange}
        outer = {"every": self.every, "nesterov": self.nesterov, "aggregation": self.aggregation, **votes}
        return outer | super().options()

    @override
    def hyperparameters(self) -> tuple[str, ...]:
        inner = [name for name in _COMPARED if all(name in group for group in self.param_groups)]
        return (OUTER_LR, OUTER_MOMENTUM, *inner)

    @override
    def make_state(self) -> None:
        for parameter in all_parameters(self):
            state = self.state[parameter]
            if ANCHOR not in state:
                state[ANCHOR] = float32_state(parameter).copy_(local(parameter))
        super().make_state()

    @override
    def state_dict(self) -> dict[str, Any]:
        """The outer state and the param groups, that of the inner optimizer, and between votes the parameters."""
        own = super().state_dict()
        if self.between_votes:
            for index, parameter in enumerate(all_parameters(self)):
                own["state"][index][OWN] = local(parameter).detach().clone()
        return own | {"inner": self.inner.state_dict()}

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the parent; between votes, the parameters become those that were saved."""
        if "inner" not in state_dict:
            raise ValueError(f"no state of an inner optimizer: this state is not of {self.method}.")
        own = {name: value for name, value in state_dict.items() if name != "inner"}
        super().load_state_dict(own)
        self.inner.load_state_dict(state_dict["inner"])
        self.inner.param_groups = self.param_groups
        for index, parameter in enumerate(all_parameters(self)):
            saved = own["state"].get(index, {}).get(OWN)
            if saved is not None:
                local(parameter).copy_(saved)

    @override
    def saved_tensors(self, group: Mapping[str, Any]) -> Iterator[tuple[int, str, Tensor]]:
        """As the parent; right after a vote without x_0, which the model has, and between votes with x_i."""
        between = bool(group.get(SINCE))
        for index, name, tensor in super().saved_tensors(group):
            if between or name != ANCHOR:
                yield index, name, tensor
        if between:
            yield from ((index, OWN, local(parameter).detach()) for index, parameter in enumerate(all_parameters(self)))

    @override
    def forget_own(self, index: int, name: str, tensor: Tensor) -> None:
        """As the parent; the parameters become x_0."""
        tensor.copy_(self.state[all_parameters(self)[index]][ANCHOR])

    def _begin(self, gradients: Sequence[Tensor | None]) -> None:
        """Before an inner step: keep the parameters that a round starts from, and find out whether the ranks fit."""
        plan = self._current_plan()
        self.make_state()
        anchors = [self.state[parameter][ANCHOR] for parameter in all_parameters(self)]
        if not self.between_votes:
            for parameter, anchor in zip(all_parameters(self), anchors, strict=True):
                anchor.copy_(local(parameter))
        if plan.channel is not None and not self.agreement.handshake_done:
            replica = replace(replica_of(self), parameters=anchors)
            self.agreement.shake_hands(plan.channel, replica, gradients, plan.compiled)

    def _displacements(self) -> list[Tensor | None]:
        """Of each parameter in float32, None where it has not moved."""
        parameters = all_parameters(self)
        moved = [laid_out_state(p, self.state[p][ANCHOR]) - local(p).float() for p in parameters]
        found = torch.stack([one.any() for one in moved]).tolist() if moved else []
        bad, self._bad_gradient = self._bad_gradient, -1
        raises = self.agreement.on_bad_gradient == "raise" and not self.agreement.scaled
        if bad >= 0 and (raises or not any(found)):
            moved[bad].fill_(torch.nan)
            found[bad] = True
        return [one if there else None for one, there in zip(moved, found, strict=True)]

    @override
    def _make_plan(self, channel: Channel | None) -> LocalPlan:
        plan = super()._make_plan(channel)
        parameters = [local(parameter) for parameter in all_parameters(self)]
        exchange = None
        if channel is not None and self.aggregation != "mean":
            words = sum(parameter.numel() for parameter in parameters) // LANES
            exchange = make_exchange(self.exchange, channel, words, self.aggregation, self.tie, parameters[0].device)
        return LocalPlan(**vars(plan), exchange=exchange)

    @override
    def _prepare(self, channel: Channel | None, voters: Sequence[int], inputs: StepInputs) -> list[Tensor]:
        """The scales, by parameter: the mean magnitude in each of its blocks, over the voters."""
        if self.aggregation == "mean":
            return []
        sizes = [-(-parameter.numel() // SCALED) for parameter in inputs.replica.parameters]
        pairs = zip(inputs.gradients, inputs.replica.parameters, strict=True)
        own = torch.cat([_magnitudes(displacement, parameter) for displacement, parameter in pairs])
        if channel is None:
            return list(own.split(sizes))
        return list(run(sum_dense(channel, own, voters)).div_(len(voters)).split(sizes))

    @override
    def _mean(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        flat = torch.cat(share.gradients)
        if self.aggregation == "mean":
            return flat if channel is None else (yield from sum_dense(channel, flat, voters)).div_(len(voters))
        scales = torch.cat([_of_elements(share.shared[span.parameter], span) for span in share.spans])
        if channel is None:
            return flat.sign_().mul_(scales)
        return (yield from self._decided(channel, voters, flat, -(-share.step // self.every))).mul_(scales)

    def _decided(
        self, channel: Channel, voters: Sequence[int], displacement: Tensor, number: int
    ) -> Conversation[Tensor]:
        """D, float32, by the signs of what the workers moved by; ``number`` is that of the vote."""
        plan = self._plan
        assert isinstance(plan, LocalPlan)
        assert plan.exchange is not None
        size = len(displacement)
        blocks = -(-size // BLOCK)
        words = torch.empty((blocks, LANES), dtype=torch.int32, device=displacement.device)
        padded = pad(displacement, (0, blocks * BLOCK - size)).view(blocks, LANES, LANES)
        lanes = torch.arange(LANES, device=displacement.device)
        pack_bits((padded > 0) | ((padded == 0) & ((lanes + channel.rank + number) & 1).bool()), words)
        ballot = Ballot(words.view(-1), words.new_empty(0), number, 1 - size / (blocks * BLOCK))
        decision = yield from plan.exchange.decide(ballot, lambda headers: voters)
        assert decision is not None
        level = torch.zeros(blocks * BLOCK, device=displacement.device)
        for weight, plane in enumerate(decision.planes):
            level.add_(unpack_bits(plane.view(blocks, LANES)).view(-1), alpha=1 << weight)
        return level[:size].mul_(2).sub_(decision.highest).div_(decision.highest)

    @override
    def _step_by_rule(
        self,
        group: dict[str, Any],
        spans: Sequence[Span],
        parameters: Sequence[Tensor],
        means: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> None:
        outer = {"lr": group[OUTER_LR], "momentum": group[OUTER_MOMENTUM], "weight_decay": 0.0}
        RULES["sgd"].apply(parameters, means, states, outer | {"nesterov": self.nesterov})


def _whole_rounds(steps: int, every: int) -> int:
    """The least multiple of ``every`` that is at least ``steps``, if that is a number of steps."""
    return -(-steps // every) * every if steps > 0 else steps


def _magnitudes(displacement: Tensor | None, parameter: Tensor) -> Tensor:
    """The mean magnitude in each block of a flat tensor, in the memory order of its parameter; zeros for None."""
    size = parameter.numel()
    blocks = -(-size // SCALED)
    if displacement is None:
        return torch.zeros(blocks, device=parameter.device)
    sums = pad(displacement, (0, blocks * SCALED - size)).view(blocks, SCALED).abs().sum(1)
    return sums.div_((size - SCALED * torch.arange(blocks, device=parameter.device)).clamp(max=SCALED))


def _of_elements(scales: Tensor, span: Span) -> Tensor:
    """The scale of each element of a span, which begins with a block."""
    first = span.start // SCALED
    return scales[first:].repeat_interleave(SCALED)[: span.length]
