"""The base of all optimizers of this package: parameters that are the same on all workers, gradients that are not."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from ..wire.collectives import Channel
from ..wire.conversation import Conversation, side_by_side
from ..wire.groups import Group, group_size, make_channel, rank_in
from ..wire.ledger import Ledger
from ..wire.shards import Shards
from .agreement import ON_BAD_GRADIENT, Agreement
from .renamed import renamed_keywords
from .replica import STEP, Replica
from .tensors import check_parameter, float32_state, laid_out_state, local, local_gradient
from .views import Views


class WorkersOptions(TypedDict, total=False):
    """Keyword arguments that all methods have; see :class:`WorkersOptimizer`."""

    process_group: Group
    on_bad_gradient: str
    check_replicas_steps: int


@dataclass(frozen=True)
class VoteShares:
    """How the votes went since they were last asked for, over all workers.

    Attributes:
        ties: share of the parameters on which the votes were split evenly; 0 for N odd.
        unanimous: share of the parameters on which all workers agreed.
    """

    ties: float
    unanimous: float


@dataclass(kw_only=True)
class Plan:
    """What stays the same from step to step.

    Attributes:
        workers: N.
        channel: this worker's place among them; None for one alone.
        views: of the parameters and their states.
        compiled: whether this worker steps by compiled kernels.
        shards: the ranks that hold this worker's replica together; None, if this one holds all of it.
    """

    workers: int
    channel: Channel | None
    views: Views
    compiled: bool = False
    shards: Shards | None = None


@dataclass(frozen=True)
class StepInputs:
    """What one step works with.

    Attributes:
        replica: as it describes itself.
        gradients: this worker's, flat, in the memory order of the parameters; None where there is none.
        bad_gradient: index of the first parameter with a NaN or Inf in its gradient; -1 if there is none. This worker
            abstains then, and has no gradients.
    """

    replica: Replica
    gradients: list[Tensor | None]
    bad_gradient: int

    @property
    def step(self) -> int:
        """Its number."""
        return self.replica.step


class WorkersOptimizer(Optimizer, ABC):
    """An optimizer of several workers that hold the same parameters and each its own gradients.

    The state of a parameter is float32 tensors of its shape, by the names of ``state_names``, made at the first step
    or when a state is loaded. The step number is an entry of every param group.

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
            is left out of it, and its state stays; or ``"raise"``, all ranks raise. With a gradient scaler, that worker
            is left out.
        check_replicas_steps: compares a checksum of the parameters over the ranks every so many steps; 0: never.

    Attributes:
        ledger: what this worker has sent and received.
        agreement: whether the workers fit together, and who was left out.
        parameter_names: for errors, by index; empty where they are those that the params were given with.
    """

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
        """How the votes went since the last call. A collective over the workers; None where nobody votes."""
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

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of this worker. The state stays float32.

        Raises:
            ValueError: the param groups do not fit, or a tensor is missing or of another shape; nothing was loaded.
        """
        states = fitting_states(state_dict, all_parameters(self), self.state_names, self.hyperparameters())
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of its parameter; ours keeps its own.
        self.state.clear()
        self.state.update(zip(all_parameters(self), states, strict=False))
        self.state_changed()

    def make_state(self) -> None:
        """Zeros for parameters that have no state yet, and each state in the memory order of its parameter."""
        for parameter, name in itertools.product(all_parameters(self), self.state_names):
            self.state[parameter][name] = laid_out_state(parameter, self.state[parameter].get(name))

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
        plan = self._current_plan()
        replica = _replica_of(self, plan)
        gradients = [local_gradient(parameter, replica.method) for parameter in all_parameters(self)]
        scaler = [getattr(self, name, None) for name in ("grad_scale", "found_inf")]
        gradients, bad = self.agreement.own_gradients(gradients, replica, self.rank, *scaler)
        if plan.channel is None:
            self.agreement.check_alone(replica, bad, self.process_group is None)
        else:
            plan.compiled = self.agreement.shake_hands(plan.channel, replica, gradients, plan.compiled)
        side_by_side(self._conversations(plan, StepInputs(replica, plan.views.flatten(gradients), bad)))
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
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of the hyperparameters that must be the same on all ranks at every step."""

    @abstractmethod
    def _make_plan(self, channel: Channel | None) -> Any:
        """Lay out the parameters for these workers, as a :class:`Plan`."""

    @abstractmethod
    def _conversations(self, plan: Any, inputs: StepInputs) -> Iterable[Conversation[None]]:
        """What is said in a step, bucket by bucket, and done with it."""

    def _current_plan(self) -> Plan:
        self.make_state()
        if self._plan is None or self._plan.workers != self.workers:
            self._plan = self._make_plan(make_channel(self.process_group, self.ledger))
            self.agreement.handshake_done = False
        parameters = all_parameters(self)
        self._plan.views.follow([local(p) for p in parameters], [self.state[p] for p in parameters])
        return self._plan


def _replica_of(optimizer: WorkersOptimizer, plan: Plan) -> Replica:
    held = [local(parameter) for parameter in all_parameters(optimizer)]
    method, names, hypers = type(optimizer).__name__, optimizer.parameter_names, optimizer.hyperparameters()
    return Replica(method, optimizer.options(), optimizer.param_groups, hypers, held, names, plan.shards)


def all_parameters(optimizer: Optimizer) -> list[Tensor]:
    """Those of all param groups, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def members_of(optimizer: Optimizer) -> Sequence[WorkersOptimizer]:
    """The workers of this process; none, where the optimizer is not of this package.

    Args:
        optimizer: as it is, or prepared by accelerate.
    """
    return getattr(getattr(optimizer, "optimizer", optimizer), "members", ())


def fitting_states(
    state_dict: dict[str, Any], parameters: Sequence[Tensor], names: Sequence[str], hyperparameters: Sequence[str]
) -> list[dict[str, Tensor]]:
    """The state of each parameter, from a state dict; none, if it has none yet.

    Raises:
        ValueError: a tensor is missing or of another shape, or a param group has not these hyperparameters.
    """
    groups = state_dict["param_groups"]
    absent = [name for name in hyperparameters for group in groups if STEP in group and name not in group]
    if absent:
        raise ValueError(f"no {absent[0]} in a param group of this state: it is of another optimizer.")
    if not state_dict["state"] and all(STEP in group for group in groups):  # of this package, before its first step
        return []
    states = []
    for index, parameter in zip([i for group in groups for i in group["params"]], parameters, strict=False):
        found = state_dict["state"].get(index, {})
        states.append({name: _fitting(found.get(name), name, index, parameter) for name in names})
    return states


def _fitting(found: Tensor | None, name: str, index: int, parameter: Tensor) -> Tensor:
    shape = local(parameter).shape
    if found is None or found.shape != shape:
        what = "there is none" if found is None else f"it has shape {tuple(found.shape)}"
        raise ValueError(
            f"no {name} of shape {tuple(shape)} for parameter {index}: {what}. This state is of "
            "another model or optimizer."
        )
    return float32_state(parameter).copy_(found)


def check_known(name: str, given: str, known: Sequence[str]) -> None:
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
