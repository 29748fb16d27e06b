"""Local steps: each worker steps by itself, and every H steps the workers vote on how far they have come.

After DiLoCo (Douillard et al., 2023, arXiv 2311.08105), whose workers average what they have moved by, and methods that
vote on it (Yu et al., 2024, arXiv 2411.17866).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import Unpack, override

from ..bits.packing import LANES
from ..wire.collectives import Channel
from ..wire.conversation import Conversation, one_turn, run
from ..wire.exchange import AGGREGATIONS, EXCHANGES, TIES, Exchange, make_exchange
from ..wire.groups import alone
from ..wire.shares import VoteShares, shares_of
from ..wire.sums import sum_dense
from .agreement import StepInputs
from .displacements import blocks_of, decide, magnitudes, of_elements
from .layout import Span
from .mean_gradient import CodedMean, MeanPlan, Share
from .replica import STEP, Replica
from .rules import RULES
from .schedule import Schedule
from .states import all_parameters
from .tensors import float32_state, laid_out_state, local, local_gradient, placed_as
from .workers import (
    Plan,
    WorkersOptimizer,
    WorkersOptions,
    check_known,
    check_range,
    members_of,
    replica_of,
    scaler_of,
)

OUTER_AGGREGATIONS = (*AGGREGATIONS, "mean")

ANCHOR, BUFFER, OWN, SENT = "anchor", "momentum_buffer", "parameter", "sent"
SINCE, OUTER_LR, OUTER_MOMENTUM = "steps_since_vote", "outer_lr", "outer_momentum"

_COMPARED = ("lr", "weight_decay", "betas", "momentum", "eps")
_OF_VOTES = ("aggregation", "tie", "exchange", "overlap")
"""Options of an optimizer that mean nothing to one inside, which votes with nobody."""


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
    x_0; with a delay, they stay the worker's own. Memory beyond the inner optimizer: x_0 in float32, m if there is an
    outer momentum, and displacements while the workers vote.

    With several ``fragments``, as many parts of the parameters vote in turn, each every ``every`` steps: the link
    carries a part at a time. With a ``delay``, the workers make as many steps while a vote is on its way, and keep what
    they have moved by since they sent it; so the parameters are the same on all workers after :meth:`vote` only, and
    x_0 always (Streaming DiLoCo, Douillard et al., 2025, arXiv 2501.18512).

    Args:
        inner: any optimizer whose state is per parameter, for dense parameters.
        every: H, inner steps from one vote to the next.
        outer_lr: learning rate of the outer rule.
        outer_momentum: its momentum, in [0, 1).
        nesterov: whether that is Nesterov's.
        fragments: parts of the parameters that vote in turn, at most ``every``; each is whole parameters.
        delay: steps from sending a vote to its effect, at most those from one part's vote to the next one's.
        aggregation: ``"mavo"``, ``"avg"`` or ``"mean"``.
        tie, exchange: of the votes, as in :class:`hf_dlion.DistributedLion`; here ties alternate by default.
        process_group: the workers; if it is not given, those of the inner optimizer, if it is of this package.
        on_bad_gradient: as above.
        check_replicas_steps: as in :class:`hf_dlion.optim.workers.WorkersOptimizer`, rounded up to whole rounds.

    Raises:
        TypeError: ``inner`` is no optimizer.
        ValueError: an argument out of its range; an inner optimizer of several workers in one process, or one that has
            local steps itself.
    """

    inner: Optimizer
    by_element = True  # a scale is that of a block in what a rank holds

    def __init__(
        self,
        inner: Optimizer,
        *,
        every: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nesterov: bool = True,
        fragments: int = 1,
        delay: int = 0,
        aggregation: str = "mavo",
        tie: str = "alternate",
        exchange: str = "auto",
        **options: Unpack[WorkersOptions],
    ) -> None:
        self.schedule = Schedule(every, fragments, delay)
        check_known("aggregation", aggregation, OUTER_AGGREGATIONS)
        check_known("tie", tie, TIES)
        check_known("exchange", exchange, EXCHANGES)
        self.inner, self.nesterov = inner, nesterov
        self.aggregation, self.tie, self.exchange = aggregation, tie, exchange
        self._bad_gradient = -1
        self._number = 0  # of the vote that is held
        self._part: Sequence[int] = ()  # the parameters that it is on
        self._holding = False  # whether it is not to have its effect yet
        self._sent: dict[int, Tensor] = {}  # x_i as it was sent, of a vote that is on its way
        self._running: list[Conversation[None]] | None = None  # that vote; None where it is to be started
        for member in _members_to_take_in(inner):
            options.setdefault("process_group", member.process_group)
            member.process_group = alone()
            member.state_changed()
        outer = {OUTER_LR: outer_lr, OUTER_MOMENTUM: outer_momentum, SINCE: 0}
        options["check_replicas_steps"] = self.schedule.whole_rounds(options.get("check_replicas_steps", 100))
        super().__init__(inner.param_groups, outer, (), (OWN, SENT), **options)
        self.state_names = _state_names(self.param_groups)  # the worker's own are its parameters, which are no state
        self.param_groups = inner.param_groups
        self.defaults = {**inner.defaults, **self.defaults}  # schedulers look for momentum there

    @property
    @override
    def method(self) -> str:
        inner = self.inner
        return f"LocalSteps({inner.method if isinstance(inner, WorkersOptimizer) else type(inner).__name__})"

    @property
    def between_votes(self) -> bool:  # type: ignore[override]
        """Whether the parameters are this worker's own now, and not those of all."""
        return any(group[SINCE] for group in self.param_groups)

    @override
    def vote_shares(self) -> VoteShares | None:
        plan = self._plan
        if not isinstance(plan, LocalPlan) or plan.exchange is None or plan.channel is None:
            return None
        return shares_of(plan.exchange, plan.channel, plan.shards)

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
        plan = self._current_plan()
        replica = replica_of(self, plan.shards)
        gradients, bad, _ = self.agreement.own_gradients(gradients, replica, self.rank, *scaler_of(self))
        self._begin(plan, replica, gradients)
        made = self.param_groups[0][STEP] + 1
        if bad < 0:
            for member in members_of(self.inner):
                member.agreement.known_finite.good = range(len(gradients))
            self.inner.step()
        else:
            self._bad_gradient = bad
        for group in self.param_groups:
            group[STEP] = made  # the inner one may count there, too
            group[SINCE] += 1
        self.ledger.steps += 1
        self._keep_schedule(made)
        return loss

    @override
    @torch.no_grad()
    def vote(self) -> None:
        """Vote on the steps made since the last vote, if there are any. A collective over the workers."""
        if not self.between_votes:
            return
        made = self.param_groups[0][STEP]
        if flight := self._flight(self.param_groups[0]):
            self._land(flight[0])
        for group in self.param_groups:
            group[SINCE] = 0
        self._vote_on(range(len(all_parameters(self))), made)

    @override
    @contextmanager
    def voted_parameters(self) -> Iterator[None]:
        if not self.between_votes:
            yield
            return
        parameters = all_parameters(self)
        own = [local(parameter).detach().clone() for parameter in parameters]
        with torch.no_grad():
            self._go_back(range(len(parameters)))
        try:
            yield
        finally:
            with torch.no_grad():
                for parameter, before in zip(parameters, own, strict=True):
                    local(parameter).copy_(before)

    @override
    def check_group(self, group: dict[str, Any]) -> None:
        check_range(OUTER_LR, group[OUTER_LR], "it cannot be negative.")
        check_range(OUTER_MOMENTUM, group[OUTER_MOMENTUM], "it is a decay, at least 0 and less than 1.", below=1)

    @override
    def options(self) -> dict[str, Any]:
        votes: dict[str, Any] = {} if self.aggregation == "mean" else {"tie": self.tie, "exchange": self.exchange}
        if self.schedule.fragments > 1 or self.schedule.delay:
            votes |= {"fragments": self.schedule.fragments, "delay": self.schedule.delay}
        outer = {"every": self.schedule.every, "nesterov": self.nesterov, "aggregation": self.aggregation, **votes}
        found = {name: value for member in members_of(self.inner) for name, value in member.options().items()}
        inner = {name: value for name, value in found.items() if name not in _OF_VOTES}
        return inner | outer | super().options()

    @override
    def hyperparameters(self) -> tuple[str, ...]:
        inner = [name for name in _COMPARED if all(name in group for group in self.param_groups)]
        return (OUTER_LR, OUTER_MOMENTUM, *inner)

    @override
    def make_state(self) -> None:
        self.state_names = _state_names(self.param_groups)
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
            parameters = all_parameters(self)
            for index, parameter in enumerate(parameters):
                own["state"][index][OWN] = parameter.detach().clone()
            for index, sent in self._sent.items():
                own["state"][index][SENT] = placed_as(parameters[index], sent.clone())
        return own | {"inner": self.inner.state_dict()}

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As the parent; between votes, the parameters become those that were saved."""
        if "inner" not in state_dict:
            raise ValueError(f"no state of an inner optimizer: this state is not of {self.method}.")
        own = {name: value for name, value in state_dict.items() if name != "inner"}
        self.state_names = _state_names(own["param_groups"])
        super().load_state_dict(own)
        self.inner.load_state_dict(state_dict["inner"])
        self.inner.param_groups = self.param_groups
        self._sent, self._bad_gradient = {}, -1
        for index, parameter in enumerate(all_parameters(self)):
            saved = own["state"].get(index, {})
            if OWN in saved:
                local(parameter).copy_(local(saved[OWN]))
            if SENT in saved:
                self._sent[index] = torch.empty_like(local(parameter)).copy_(local(saved[SENT]))

    @override
    def common_parameters(self) -> list[Tensor]:
        """x_0; before there is any, the parameters."""
        return [self.state[p][ANCHOR] if ANCHOR in self.state[p] else local(p) for p in all_parameters(self)]

    @override
    def saved_tensors(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, Tensor]]:
        """As the parent; right after a vote without x_0, which the model has, and between votes with x_i."""
        names, between = _state_names(groups), bool(groups[0].get(SINCE))
        if BUFFER in names:  # where a run is taken over, there may be none here yet
            for parameter in all_parameters(self):
                self.state[parameter][BUFFER] = laid_out_state(parameter, self.state[parameter].get(BUFFER))
        for index, name, tensor in super().saved_tensors(groups):
            if name in names and (between or name != ANCHOR):
                yield index, name, tensor
        _, flying = (between and self._flight(groups[0])) or (0, ())
        parameters = [local(parameter).detach() for parameter in all_parameters(self)]
        self._sent = {i: self._sent[i] if i in self._sent else parameters[i].clone() for i in flying}
        if between:
            yield from ((index, OWN, parameter) for index, parameter in enumerate(parameters))
            yield from ((index, SENT, sent) for index, sent in self._sent.items())

    @override
    def forget_own(self, index: int, name: str, tensor: Tensor) -> None:
        """As the parent; the parameters become x_0."""
        tensor.copy_(self.state[all_parameters(self)[index]][ANCHOR])

    @override
    def state_changed(self) -> None:
        super().state_changed()
        self._running = None

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_running": None}

    def _begin(self, plan: Plan, replica: Replica, gradients: Sequence[Tensor | None]) -> None:
        """Before an inner step: keep the parameters that a round starts from, and find out whether the ranks fit."""
        self.make_state()
        if not self.between_votes:
            self._agree(range(len(all_parameters(self))))
        if plan.channel is not None and not self.agreement.handshake_done:
            self.agreement.shake_hands(plan.channel, replica, gradients, plan.compiled)

    def _agree(self, indices: Iterable[int]) -> None:
        """Take these parameters for x_0."""
        parameters = all_parameters(self)
        for parameter in (parameters[index] for index in indices):
            self.state[parameter][ANCHOR].copy_(local(parameter))

    def _go_back(self, indices: Iterable[int]) -> None:
        """Make these parameters x_0."""
        parameters = all_parameters(self)
        for parameter in (parameters[index] for index in indices):
            local(parameter).copy_(self.state[parameter][ANCHOR])

    def _keep_schedule(self, made: int) -> None:
        """After so many steps: the vote on its way goes on, or has its effect; and the part votes whose turn it is."""
        group = self.param_groups[0]
        if flight := self._flight({STEP: made - 1, SINCE: group[SINCE] - 1}):
            if made == flight[0] + self.schedule.delay:
                self._land(flight[0])
            elif self._running is None:
                self._depart(flight[0])
            elif made == flight[0] + (1 + self.schedule.delay) // 2:
                self._running = one_turn(self._running)  # of two rounds, each has half of the delay
        part, parameters = self.schedule.part(made, self._sizes()), all_parameters(self)
        if part and self.schedule.delay:
            self._sent = {index: local(parameters[index]).clone() for index in part}
            self._depart(made)
        elif part and self.schedule.fragments > 1:
            self._vote_on(part, made)
        elif part:
            self.vote()

    def _sizes(self) -> list[int]:
        return [parameter.numel() for parameter in all_parameters(self)]

    def _flight(self, group: Mapping[str, Any]) -> tuple[int, list[int]] | None:
        """After how many steps the vote was sent that is on its way, and of which parameters; None if there is none."""
        return self.schedule.flight(group[STEP], group[SINCE], self._sizes())

    def _vote_on(self, indices: Sequence[int], made: int) -> None:
        """Vote on these parameters, which become x_0."""
        parameters = all_parameters(self)
        self._exchange_votes({index: local(parameters[index]) for index in indices}, made)
        self._agree(indices)

    def _exchange_votes(self, own: Mapping[int, Tensor], made: int) -> None:
        """Move from x_0 by what is decided on how far this worker's own parameters, by index, have come from there."""
        displacements, indices = self._displacements(own), list(own)
        self._go_back(indices)
        self._number, self._part, self._holding = self.schedule.number(made), indices, False
        self._take_part(displacements, None, self._overflow())

    def _depart(self, made: int) -> None:
        """Send the votes on what has been kept for it after so many steps."""
        self._number, self._part, self._holding = self.schedule.number(made), list(self._sent), True
        try:
            self._take_part(self._displacements(self._sent), None, self._overflow())
        except BaseException:
            self._sent = {}
            raise

    def _land(self, made: int) -> None:
        """Let the votes sent after so many steps have their effect; what was moved by since then is kept."""
        if self._running is None:
            self._depart(made)
        indices = list(self._sent)  # none, where sending has failed
        plan, parameters = self._current_plan(), all_parameters(self)
        since = {index: local(parameters[index]).float() - self._sent[index].float() for index in indices}
        self._go_back(indices)
        plan.views.follow([local(p) for p in parameters], [self.state[p] for p in parameters])
        self._holding = False
        while self._running:
            self._running = one_turn(self._running)
        self._agree(indices)
        for index, moved in since.items():
            local(parameters[index]).copy_(self.state[parameters[index]][ANCHOR] + moved)
        self._sent, self._running = {}, None

    def _overflow(self) -> Tensor | None:
        """For a vote, where a gradient scaler calls: with one, all may abstain."""
        return torch.zeros((), dtype=torch.float32) if self.agreement.scaled else None

    @override
    def _decide(self, plan: LocalPlan, inputs: StepInputs) -> None:
        if self._holding:
            self._running = one_turn(self._conversations(plan, inputs))
        else:
            super()._decide(plan, inputs)

    def _displacements(self, own: Mapping[int, Tensor]) -> list[Tensor | None]:
        """Of each parameter in float32, from x_0 to this worker's own, by index; None where it has not moved."""
        parameters = all_parameters(self)
        moved = {
            i: laid_out_state(parameters[i], self.state[parameters[i]][ANCHOR]) - x.float() for i, x in own.items()
        }
        found = torch.stack([one.any() for one in moved.values()]).tolist() if moved else []
        given: list[Tensor | None] = [None] * len(parameters)
        for (index, displacement), there in zip(moved.items(), found, strict=True):
            given[index] = displacement if there else None
        bad, self._bad_gradient = self._bad_gradient, -1
        raises = self.agreement.on_bad_gradient == "raise" and not self.agreement.scaled
        if bad >= 0 and (raises or not self._replica_moved(any(found))):
            given[bad] = torch.full_like(local(parameters[bad]), torch.nan)
        return given

    def _replica_moved(self, moved: bool) -> bool:
        """Whether any shard of this worker has moved."""
        plan = self._current_plan()
        if plan.shards is None:
            return moved
        return any(plan.shards.combine([int(moved)], local(all_parameters(self)[0]).device))

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
        """The scales, by parameter that the vote is on: the mean magnitude in each of its blocks, over the voters."""
        if self.aggregation == "mean":
            return []
        parameters = inputs.replica.parameters
        none = parameters[0].new_empty(0, dtype=torch.float32)  # the vote is on nothing, where sending has failed
        own = torch.cat([none, *(magnitudes(inputs.gradients[index], parameters[index]) for index in self._part)])
        sizes = [0] * len(parameters)
        for index in self._part:
            sizes[index] = blocks_of(parameters[index])
        if channel is None:
            return list(own.split(sizes))
        return list(run(sum_dense(channel, own, voters)).div_(len(voters)).split(sizes))

    @override
    def _mean(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        flat = torch.cat(share.gradients)
        if self.aggregation == "mean":
            mean = flat if channel is None else (yield from sum_dense(channel, flat, voters)).div_(len(voters))
        else:
            scales = torch.cat([of_elements(share.shared[span.parameter], span) for span in share.spans])
            if channel is None:
                mean = flat.sign_()
            else:
                assert isinstance(self._plan, LocalPlan)
                assert self._plan.exchange is not None
                mean = yield from decide(self._plan.exchange, channel.rank, voters, flat, self._number)
            mean.mul_(scales)
        while self._holding:
            yield
        return mean

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


def _state_names(groups: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Of a parameter: x_0, and its momentum if there is any."""
    return (ANCHOR, BUFFER) if any(group.get(OUTER_MOMENTUM) for group in groups) else (ANCHOR,)


def _members_to_take_in(inner: Optimizer) -> Sequence[WorkersOptimizer]:
    """The one worker of an inner optimizer of this package, none of others.

    Raises:
        TypeError: it is no optimizer.
        ValueError: it cannot be an inner one.
    """
    if not isinstance(inner, Optimizer):
        raise TypeError(f"LocalSteps takes an optimizer, which steps between the votes, not a {type(inner).__name__}.")
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
    return members
