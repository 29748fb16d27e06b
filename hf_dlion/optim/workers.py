"""The base of all optimizers of this package: parameters that are the same on all workers, gradients that are not."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, overload
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from ..wire.collectives import Channel
from ..wire.conversation import Conversation, side_by_side
from ..wire.groups import Group, group_size, make_channel, rank_in
from ..wire.ledger import Ledger
from ..wire.liveness import show_step
from ..wire.shards import Shards
from ..wire.shares import VoteShares
from .agreement import ON_BAD_GRADIENT, Agreement, Judged, LayoutChangedError, StepInputs
from .renamed import renamed_keywords
from .replica import STEP, Layout, Replica, layout_of
from .states import StatefulOptimizer, all_parameters, check_layout, warn_of_frozen
from .tensors import check_parameter, local, local_gradient
from .views import Views


class WorkersOptions(TypedDict, total=False):
    """Keyword arguments that all methods have; see :class:`WorkersOptimizer`."""

    process_group: Group
    on_bad_gradient: str
    check_replicas_steps: int


@dataclass(kw_only=True)
class Plan:
    """What stays the same from step to step.

    Attributes:
        workers: N.
        channel: this worker's place among them; None for one alone.
        views: of the parameters and their states.
        layout: of the parameters that it was made for.
        compiled: whether this worker steps by compiled kernels.
        shards: the ranks that hold this worker's replica together; None, if this one holds all of it.
        defers_verdict: whether a bad gradient need not be known before the votes are sent.
    """

    workers: int
    channel: Channel | None
    views: Views
    layout: Layout = ()
    compiled: bool = False
    shards: Shards | None = None
    defers_verdict: bool = False

    def settle(self, compiled: bool) -> None:
        """Step by compiled kernels, as all workers can, or as none does."""
        self.compiled = compiled


class WorkersOptimizer(StatefulOptimizer):
    """An optimizer of several workers that hold the same parameters and each its own gradients.

    The step number is an entry of every param group.

    A ``torch.amp.GradScaler`` hands over its scale: the worker whose gradient overflowed abstains and its scale falls,
    while the others step; where all overflow, the step changes no parameter, and after 40 such steps in a row, which no
    scale explains, all ranks raise. So scales differ between the workers.

    Args:
        params: parameters, named parameters or param groups; dense, real floating point, on one device.
        defaults: hyperparameters of a param group.
        shared_state_names: keys of a parameter's state that is the same on all workers.
        local_state_names: keys of a parameter's state that each worker has for itself.
        process_group: the workers; None is the default group. Or this one's place among virtual workers.
        on_bad_gradient: what becomes of a step where a worker's gradient has a NaN or Inf: ``"abstain"``, that worker
            is left out of it, and its state stays, as always with a gradient scaler; or ``"raise"``, all ranks raise.
        check_replicas_steps: compares a checksum of the parameters over the ranks every so many steps; 0: never.

    Attributes:
        ledger: what this worker has sent and received.
        agreement: whether the workers fit together, and who was left out.
        parameter_names: for errors, by index; empty where they are those that the params were given with.
    """

    living: ClassVar[WeakSet[WorkersOptimizer]] = WeakSet()
    """Those that were made and are still there."""

    bounded_by_decay = False
    """Whether weight decay keeps the parameters in Lion's box (arXiv 2310.05898)."""

    # torch's GradScaler then calls step() on every rank, with `grad_scale` and `found_inf` set meanwhile.
    _step_supports_amp_scaling = True

    @renamed_keywords(check_replicas_every="check_replicas_steps")
    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        shared_state_names: tuple[str, ...],
        local_state_names: tuple[str, ...],
        *,
        process_group: Group = None,
        on_bad_gradient: str = "abstain",
        check_replicas_steps: int = 100,
    ) -> None:
        check_known("on_bad_gradient", on_bad_gradient, ON_BAD_GRADIENT)
        check_range("check_replicas_steps", check_replicas_steps, "it is a number of steps, or 0.")
        self.process_group = process_group
        self.ledger = Ledger()
        self.agreement = Agreement(on_bad_gradient, check_replicas_steps)
        self.local_state_names = local_state_names
        self.state_names = (*shared_state_names, *local_state_names)
        self.parameter_names: list[str] = []
        self._plan: Plan | None = None
        super().__init__(params, defaults | {STEP: 0})
        self.living.add(self)

    @property
    def workers(self) -> int:
        """N, the number of workers; 1 without a process group."""
        return group_size(self.process_group)

    @property
    def rank(self) -> int:
        """The number of this worker, from 0."""
        return rank_in(self.process_group)

    @property
    def members(self) -> Sequence[WorkersOptimizer]:
        """The workers of this process, each an optimizer with its own state."""
        return [self]

    @property
    def gradients(self) -> list[list[Tensor | None]]:
        """By worker of this process, its gradients before a step, by parameter."""
        return [[parameter.grad for parameter in all_parameters(self)]]

    @property
    def bad_gradients(self) -> int:
        """Workers left out of a step for a bad gradient, over all steps of this object."""
        return self.agreement.bad_gradients

    abstentions = bad_gradients  # its former name

    def vote_shares(self) -> VoteShares | None:
        """How the votes went since the last call. A collective over the workers; None where nobody voted."""
        return None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with a state of zeros. On all ranks alike, between two steps."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[STEP] = self.param_groups[0][STEP]
        try:
            self.check_group(group)
            first = next(iter(all_parameters(self)), None)
            for parameter in group["params"]:
                check_parameter(parameter, first.device if first is not None else parameter.device)
        except ValueError:
            self.param_groups.pop()
            raise
        self.state_changed()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Exchange and update. A collective over the workers.

        Args:
            closure: computes the loss again and returns it.

        Raises:
            FloatingPointError: all ranks have a NaN or Inf in a gradient, or one has with ``on_bad_gradient="raise"``;
                raised on all ranks.
            RuntimeError: the ranks do not fit together (parameters, options, hyperparameters or steps differ), or all
                have the same gradients at the first step; raised on all ranks. Or a gradient is sparse.
            No parameter has changed then; what a worker keeps for itself may have.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [local_gradient(parameter, self.method) for parameter in all_parameters(self)]
        self._take_part(gradients, *scaler_of(self))
        for group in self.param_groups:
            group[STEP] += 1
        self.ledger.steps += 1
        return loss

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a hyperparameter is out of its range."""
        check_range("lr", group["lr"], "it cannot be negative.")
        check_range("weight_decay", group["weight_decay"], "it cannot be negative.")

    def state_changed(self) -> None:
        """Start over; to be called when parameters or state were changed from outside."""
        self.agreement.handshake_done = False
        self._plan = None

    def options(self) -> dict[str, Any]:
        """Options that must be the same on all ranks, besides hyperparameters."""
        return self.agreement.options()

    @abstractmethod
    def _make_plan(self, channel: Channel | None) -> Any:
        """Lay out the parameters for these workers, as a :class:`Plan`."""

    @abstractmethod
    def _conversations(self, plan: Any, inputs: StepInputs) -> Iterable[Conversation[None]]:
        """What is said in a step, bucket by bucket, and done with it."""

    def _take_part(self, gradients: list[Tensor | None], *scaler: Tensor | None) -> None:
        """Exchange and update with these gradients, as far as they are good."""
        plan = self._current_plan()
        replica = replica_of(self, plan.shards)
        show_step(replica.step)
        judged = self.agreement.own_gradients(gradients, replica, self.rank, *scaler, defer=plan.defers_verdict)
        try:
            self._exchange(plan, replica, judged)
        except LayoutChangedError:
            self.state_changed()
            plan = self._current_plan()
            self._exchange(plan, replica_of(self, plan.shards), self.agreement.settled(judged, replica, self.rank))

    def _exchange(self, plan: Plan, replica: Replica, judged: Judged) -> None:
        """Exchange and update, or find out with the others that the parameters are laid out otherwise by now."""
        changed = plan.layout != replica.layout
        if changed:
            gradients: list[Tensor | None] = [None] * len(plan.layout)
        else:
            self.make_state()
            plan.views.follow(replica.parameters, [self.state[parameter] for parameter in all_parameters(self)])
            gradients = plan.views.flatten(judged[0])
        inputs = StepInputs(replica, gradients, judged[1], changed, judged[2])
        if plan.channel is None:
            self.agreement.check_alone(inputs, self.process_group is None)
        else:
            plan.settle(self.agreement.shake_hands(plan.channel, replica, gradients, plan.compiled))
        self._decide(plan, inputs)

    def _decide(self, plan: Any, inputs: StepInputs) -> None:
        """Hold the conversations of a step."""
        side_by_side(self._conversations(plan, inputs))

    def _current_plan(self) -> Plan:
        plan, layout = self._plan, layout_of([local(parameter) for parameter in all_parameters(self)])
        if plan is None or plan.workers != self.workers or (plan.channel is None and plan.layout != layout):
            warn_of_frozen(all_parameters(self), self.rank)
            check_layout(replica_of(self), [self.state.get(parameter, {}) for parameter in all_parameters(self)])
            plan = self._plan = self._make_plan(make_channel(self.process_group, self.ledger))
            plan.layout = layout
            self.agreement.handshake_done = False
        return plan


def replica_of(optimizer: WorkersOptimizer, shards: Shards | None = None) -> Replica:
    """As the optimizer holds it now.

    Args:
        optimizer: of one worker.
        shards: as of :class:`Plan`.
    """
    held = [local(parameter) for parameter in all_parameters(optimizer)]
    names, hypers = optimizer.parameter_names, optimizer.hyperparameters()
    return Replica(
        optimizer.method,
        optimizer.options(),
        optimizer.param_groups,
        hypers,
        held,
        names,
        shards,
        optimizer.common_parameters(),
    )


def scaler_of(optimizer: WorkersOptimizer) -> list[Tensor | None]:
    """What a gradient scaler leaves while it calls a step: its scale, and whether it found an overflow."""
    return [getattr(optimizer, name, None) for name in ("grad_scale", "found_inf")]


def members_of(optimizer: Optimizer) -> Sequence[WorkersOptimizer]:
    """The workers of this process; none, where the optimizer is not of this package.

    Args:
        optimizer: as it is, or prepared by accelerate.
    """
    return getattr(getattr(optimizer, "optimizer", optimizer), "members", ())


def check_known(name: str, given: str | int, known: Sequence[str | int]) -> None:
    """Raise ValueError unless the value of an argument is one of those known."""
    if given not in known:
        raise ValueError(f"{name}={given!r} is not known; it is one of {', '.join(map(repr, known))}.")


def check_range(name: str, value: Any, what: str, below: float = float("inf")) -> None:
    """Raise ValueError unless 0 <= value < below."""
    if not 0 <= float(value) < below:
        raise ValueError(f"{name}={value}: {what}")


def check_betas(betas: Sequence[float]) -> None:
    """Raise ValueError unless these are two decays."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas}: there are two, each at least 0 and less than 1.")
