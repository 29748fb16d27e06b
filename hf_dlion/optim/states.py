"""What the optimizers here owe to ``torch.optim.Optimizer``: state dicts, copies, pickles."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from .replica import STEP, Replica
from .tensors import alike_sharded, check_parameter, float32_state, laid_out_state, local, placed_as

logger = logging.getLogger(__name__)

WORKER = "worker"
"""Entry of a param group in a state dict: whose state it is."""

_OF_ANOTHER = (
    "worker %d of %d has loaded the %s of worker %d: the state differs between the workers, and whoever saved it kept "
    "that of one. hf_dlion.load_workers, called after this, puts its own in its place, if save_workers has saved it."
)


class StatefulOptimizer(Optimizer, ABC):
    """An optimizer whose workers have a state each.

    The state of a parameter is float32 tensors of its shape, by the names that :meth:`states_of` gives for its
    group, made at the first step or when a state is loaded.

    Attributes:
        state_names: keys of all parameters' states.
        local_state_names: those of them that each worker has for itself.
        inner: the optimizer that steps on this worker alone between two exchanges; None, if each step is an exchange.
        between_votes: whether the parameters are this worker's own now, and not those of all.
    """

    state_names: tuple[str, ...]
    local_state_names: tuple[str, ...]
    inner: Optimizer | None = None
    between_votes = False

    @property
    @abstractmethod
    def workers(self) -> int:
        """How many there are."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """The number of this worker, from 0."""

    @property
    def method(self) -> str:
        """What it is, for messages and checkpoints: the name of its class."""
        return type(self).__name__

    @abstractmethod
    def hyperparameters(self) -> tuple[str, ...]:
        """Names of the hyperparameters that must be the same on all ranks at every step."""

    @abstractmethod
    def state_changed(self) -> None:
        """Start over; to be called when parameters or state were changed from outside."""

    def __getstate__(self) -> dict[str, Any]:
        return copyable(self) | {"_plan": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> StatefulOptimizer:
        """With parameters and state of its own, and the same process group, which cannot be copied."""
        group = getattr(self, "process_group", None)
        if isinstance(group, dist.ProcessGroup):
            memo[id(group)] = group
        copied: StatefulOptimizer = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def state_dict(self) -> dict[str, Any]:
        """The state and the param groups, with the number of this worker in each.

        Of sharded parameters, the state is sharded as they are.
        """
        first_hook = self.register_state_dict_post_hook(_place_as_parameters, prepend=True)
        try:
            return marked(super().state_dict(), self.rank)
        finally:
            first_hook.remove()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of this worker; of another one, with a warning. The state stays float32.

        Raises:
            ValueError: the param groups do not fit, or a tensor is missing or of another shape; nothing was loaded.
        """
        states: list[dict[str, Tensor]] = []

        def check(_: Optimizer, given: dict[str, Any]) -> None:
            states.extend(fitting_states(given, self._named_states(), self.hyperparameters()))

        last_hook = self.register_load_state_dict_pre_hook(check)  # it sees what others have made of the state dict
        try:
            super().load_state_dict(state_dict)
        finally:
            last_hook.remove()
        check_owner(self.param_groups, self.rank, self.workers, self.local_state_names)
        # torch casts state to the dtype of its parameter; ours keeps its own.
        self.state.clear()
        self.state.update(zip(all_parameters(self), states, strict=False))
        self.state_changed()

    def make_state(self) -> None:
        """Zeros for parameters that have no state yet, and each state in the memory order of its parameter."""
        for parameter, names in self._named_states():
            for name in names:
                self.state[parameter][name] = laid_out_state(parameter, self.state[parameter].get(name))

    def states_of(self, group: Mapping[str, Any]) -> tuple[str, ...]:
        """Those of ``state_names`` that the parameters of a group have."""
        return self.state_names

    def _named_states(self) -> list[tuple[Tensor, tuple[str, ...]]]:
        """Each parameter, with the names of its states."""
        return [(parameter, self.states_of(group)) for group in self.param_groups for parameter in group["params"]]

    def vote(self) -> None:
        """Make the parameters those of all again, before a round of local steps ends by itself. A collective."""

    @contextmanager
    def voted_parameters(self) -> Iterator[None]:
        """Lets the model have the parameters of the last vote, the same on all workers: to evaluate or to save it."""
        yield

    def common_parameters(self) -> list[Tensor]:
        """What must be the same on all workers: the parameters, or those of the last vote."""
        return [local(parameter) for parameter in all_parameters(self)]

    def saved_tensors(self, groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, Tensor]]:
        """What a checkpoint has of this worker: index of the parameter, name, and the tensor to read or to fill.

        Args:
            groups: the param groups as they are saved, or were.
        """
        for index, parameter in enumerate(all_parameters(self)):
            for name, tensor in self.state[parameter].items():
                yield index, name, local(tensor)

    def forget_own(self, index: int, name: str, tensor: Tensor) -> None:
        """Start over with one of those tensors that this worker has for itself."""
        tensor.zero_()


class HasGroups(Protocol):
    """An optimizer, as far as its parameters go."""

    param_groups: list[dict[str, Any]]


def all_parameters(optimizer: HasGroups) -> list[Tensor]:
    """Those of all param groups, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def warn_of_frozen(parameters: Sequence[Tensor], rank: int) -> None:
    """On rank 0, where most of what an optimizer was given is not trained."""
    elements = sum(parameter.numel() for parameter in parameters)
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    if rank == 0 and 2 * frozen > elements:
        logger.warning(
            "of %d parameters that the optimizer was given, %d require no gradient, and cost momenta and votes all the "
            "same. Give it the others: [p for p in model.parameters() if p.requires_grad].",
            elements,
            frozen,
        )


def _place_as_parameters(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    parameters = all_parameters(optimizer)
    for index, state in state_dict["state"].items():
        state_dict["state"][index] = {name: placed_as(parameters[index], held) for name, held in state.items()}


def copyable(optimizer: Optimizer) -> dict[str, Any]:
    """What copying and pickling takes along: as with torch's optimizers, no hooks, nor a scheduler's ``step``."""
    return {name: value for name, value in vars(optimizer).items() if not name.endswith("_hooks") and name != "step"}


def marked(state_dict: dict[str, Any], worker: int) -> dict[str, Any]:
    """A state dict that says whose it is."""
    for group in state_dict.get("param_groups", ()):  # a hook may have made something else of it
        group[WORKER] = worker
    return state_dict


def check_owner(groups: list[dict[str, Any]], rank: int, workers: int, local_states: Sequence[str]) -> None:
    """Take the mark off param groups that were loaded; warn if they are of another worker, and it matters.

    Args:
        groups: as loaded.
        rank: this worker's number.
        workers: how many there are.
        local_states: names of states that differ between the workers.
    """
    owners = [group.pop(WORKER, rank) for group in groups]
    others = [owner for owner in owners if owner != rank]
    if local_states and others:
        logger.warning(_OF_ANOTHER, rank, workers, local_states[0], others[0])


def fitting_states(
    state_dict: dict[str, Any], named: Sequence[tuple[Tensor, Sequence[str]]], hyperparameters: Sequence[str]
) -> list[dict[str, Tensor]]:
    """The state of each parameter, from a state dict; none, if it has none yet.

    Args:
        state_dict: of an optimizer.
        named: the parameters, each with the names of its states.
        hyperparameters: names of what its param groups have.

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
    for index, (parameter, names) in zip([i for group in groups for i in group["params"]], named, strict=False):
        found = state_dict["state"].get(index, {})
        states.append({name: _fitting(found.get(name), name, index, parameter) for name in names})
    return states


def _fitting(found: Tensor | None, name: str, index: int, parameter: Tensor) -> Tensor:
    if found is None or found.shape != parameter.shape:
        what = "there is none" if found is None else f"it has shape {tuple(found.shape)}"
        raise ValueError(
            f"no {name} of shape {tuple(parameter.shape)} for parameter {index}: {what}. This state is of "
            "another model or optimizer."
        )
    if not alike_sharded(found, parameter):
        raise ValueError(
            f"the {name} of parameter {index} is not sharded as the parameter is. hf_dlion.save_workers and "
            "load_workers reshard the state of every worker; torch.distributed.checkpoint, that of one."
        )
    return float32_state(parameter).copy_(local(found))


def check_layout(replica: Replica, states: Sequence[Mapping[str, Tensor]]) -> None:
    """Raise ValueError where a parameter cannot be voted on, or is no longer of the shape of its state.

    Args:
        replica: this worker's.
        states: by parameter; empty where there is none yet.
    """
    for index, (parameter, state) in enumerate(zip(replica.parameters, states, strict=True)):
        check_parameter(parameter, replica.parameters[0].device, replica.name(index))
        for name, tensor in state.items():
            if tensor.shape != parameter.shape:
                raise ValueError(
                    f"{replica.name(index)} has shape {tuple(parameter.shape)}, and its {name} {tuple(tensor.shape)}: "
                    "it was resized after the optimizer had stepped. Make a new optimizer for the resized model, or "
                    "resize before the first step."
                )
