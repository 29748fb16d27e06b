"""What the optimizers of this package share: the workers, their ledger, and finding out that ranks do not fit."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import TypedDict

from ..wire.collectives import Channel, ProcessChannel
from ..wire.ledger import Ledger
from ..wire.local import LocalChannel, LocalWorker
from .agreement import Note, Opening, checksum, differing, digest, exchange_openings, first_bad_gradient
from .layout import memory_order

logger = logging.getLogger(__name__)

STEP = "step"
ON_BAD_GRADIENT = ("abstain", "raise")
# Of a gradient scaler, steps in a row in which all workers overflow; from 65536, its scale is 6e-8 then.
_MOST_OVERFLOWS = 40


class WorkersOptions(TypedDict, total=False):
    """Keyword arguments that all methods have; see :class:`WorkersOptimizer`."""

    process_group: dist.ProcessGroup | LocalWorker | None
    on_bad_gradient: str
    check_replicas_every: int


class WorkersOptimizer(Optimizer, ABC):
    """An optimizer of several workers that hold the same parameters and each its own gradients.

    The state of a parameter is float32 tensors of its shape, made with the parameter, under the names of
    ``_state_names``. The step number is an entry of every param group.

    A ``torch.amp.GradScaler`` hands over its scale: the worker whose gradient overflowed abstains and its scale falls,
    while the others step; where all overflow, the step changes no parameter, and after 40 such steps in a row, which no
    scale explains, all ranks raise. So scales differ between the workers.

    Args:
        params: parameters, named parameters or param groups; dense, real floating point, on one device.
        defaults: hyperparameters of a param group.
        state_names: keys of a parameter's state that is the same on all workers.
        local_state_names: keys of a parameter's state that each worker has for itself.
        process_group: the workers; None is the default group. Or this one's place among virtual workers.
        on_bad_gradient: what becomes of a step where a worker's gradient has a NaN or Inf: ``"abstain"``, that worker
            is left out of it, and its state stays; or ``"raise"``, all ranks raise. With a gradient scaler, that worker
            is left out.
        check_replicas_every: compares a checksum of the parameters over the ranks every so many steps; 0: never.

    Attributes:
        ledger: what this worker has sent and received.
        opened: whether the workers have found that they fit together; not so before the first step.
        parameter_names: for errors, by index; empty where they are those that the params were given with.
        abstentions: workers left out of a step for a bad gradient, over all steps of this object.
    """

    _state_format = torch.contiguous_format
    # torch's GradScaler then calls step() on every rank, with `grad_scale` and `found_inf` set meanwhile.
    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        state_names: tuple[str, ...],
        local_state_names: tuple[str, ...],
        *,
        process_group: dist.ProcessGroup | LocalWorker | None = None,
        on_bad_gradient: str = "abstain",
        check_replicas_every: int = 100,
    ) -> None:
        if on_bad_gradient not in ON_BAD_GRADIENT:
            known = ", ".join(map(repr, ON_BAD_GRADIENT))
            raise ValueError(f"on_bad_gradient={on_bad_gradient!r} is not known; it is one of {known}.")
        check_range("check_replicas_every", check_replicas_every, "it is a number of steps, or 0.")
        self.process_group = process_group
        self.on_bad_gradient = on_bad_gradient
        self.check_replicas_every = check_replicas_every
        self.abstentions = 0
        self.ledger = Ledger()
        self.local_state_names = local_state_names
        self._state_names = (*state_names, *local_state_names)
        self._checking_gradients = True
        self._overflows = 0
        self.parameter_names: list[str] = []
        self.opened = False
        super().__init__(params, defaults | {STEP: 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with a state of zeros. On all ranks alike, between two steps."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[STEP] = self.param_groups[0][STEP]
        try:
            self.check_group(group)
            for parameter in group["params"]:
                _check_parameter(parameter, self.param_groups[0]["params"][0].device)
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            self.state[parameter] = {
                name: torch.zeros_like(
                    parameter, dtype=torch.float32, requires_grad=False, memory_format=self._state_format
                )
                for name in self._state_names
            }
        self.state_changed()

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of this worker. The state stays float32.

        Raises:
            ValueError: the param groups do not fit, or a tensor is missing or of another shape; nothing was loaded.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        states = []
        for index, parameter in zip(saved, self._all_parameters(), strict=False):
            found = state_dict["state"].get(index, {})
            states.append({name: self._fitting(found.get(name), name, index, parameter) for name in self._state_names})
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of its parameter; ours keeps its own.
        for parameter, state in zip(self._all_parameters(), states, strict=True):
            self.state[parameter] = state
        self.state_changed()

    @property
    def workers(self) -> int:
        """N, the number of workers; 1 without a process group.

        Raises:
            RuntimeError: this rank is not in ``process_group``.
        """
        if isinstance(self.process_group, LocalWorker):
            return self.process_group.group.size
        if self.process_group is None and not (dist.is_available() and dist.is_initialized()):
            return 1
        size = dist.get_world_size(self.process_group)
        if size < 1:
            raise RuntimeError(
                f"rank {dist.get_rank()} is not in the process_group that its optimizer was given, so it cannot vote "
                "there. Give each rank the group that it is a member of."
            )
        return size

    @property
    def rank(self) -> int:
        """The number of this worker, from 0."""
        if isinstance(self.process_group, LocalWorker):
            return self.process_group.rank
        return dist.get_rank(self.process_group) if self.workers > 1 else 0

    def _make_channel(self) -> Channel:
        if isinstance(self.process_group, LocalWorker):
            return LocalChannel(self.process_group, self.ledger)
        return ProcessChannel(self.process_group, self.ledger)

    def _fitting(self, found: Tensor | None, name: str, index: int, parameter: Tensor) -> Tensor:
        if found is None or found.shape != parameter.shape:
            what = "there is none" if found is None else f"it has shape {tuple(found.shape)}"
            raise ValueError(
                f"no {name} of shape {tuple(parameter.shape)} for parameter {index}: {what}. This state is of "
                "another model or optimizer."
            )
        own = torch.empty_like(parameter, dtype=torch.float32, requires_grad=False, memory_format=self._state_format)
        return own.copy_(found)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a hyperparameter is out of its range."""
        check_range("lr", group["lr"], "it cannot be negative.")
        check_range("weight_decay", group["weight_decay"], "it cannot be negative.")

    def state_changed(self) -> None:
        """To be called when parameters or state have been changed, or replaced, from outside."""
        self.opened = False

    def options(self) -> dict[str, Any]:
        """Options that must be the same on all ranks, besides hyperparameters."""
        return {"on_bad_gradient": self.on_bad_gradient, "check_replicas_every": self.check_replicas_every}

    @abstractmethod
    def settings(self) -> tuple[str, ...]:
        """Names of the hyperparameters that must be the same on all ranks at every step."""

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _gradients(self, parameters: Sequence[Tensor]) -> tuple[list[Tensor | None], int]:
        """The gradients, and the index of the first bad one. A worker with a bad one has none: it abstains."""
        for parameter in parameters:
            if parameter.grad is not None and parameter.grad.layout != torch.strided:
                raise RuntimeError(
                    f"a gradient of layout {parameter.grad.layout} (parameter of shape {tuple(parameter.shape)}): "
                    f"{type(self).__name__} works on every element. Use dense gradients, as "
                    "nn.Embedding(sparse=False) gives."
                )
        gradients = [parameter.grad for parameter in parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        scale = getattr(self, "grad_scale", None)
        if scale is not None and present:
            torch._foreach_div_(present, scale.to(present[0].device))
        bad = first_bad_gradient(gradients)
        if bad < 0 and self.found_inf is not None and bool(self.found_inf):
            bad = 0  # something else, clipping by value say, has made finite what the scaler found to be infinite
        if bad < 0:
            return gradients, bad
        if not self._scaled and self.on_bad_gradient == "abstain":
            logger.warning("worker %d abstains from a step: %s", self.rank, self._describe_bad(bad))
        return [None] * len(parameters), bad

    def _open(
        self, channel: Channel, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], compiled: bool
    ) -> bool:
        """Before the first step: find out, on all ranks alike, whether they fit together and all have compiled."""
        opening = Opening(
            digest(self._describe_layout()),
            int(compiled),
            checksum(parameters),
            checksum([g for g in gradients if g is not None]),
        )
        openings = exchange_openings(channel, opening, parameters[0].device)
        if any(other.layout != opening.layout for other in openings):
            raise RuntimeError(
                f"the ranks do not optimize the same parameters in the same way: "
                f"{differing(channel, self._describe_layout())}. Build model and optimizer alike on every rank."
            )
        if any(other.parameters != opening.parameters for other in openings):
            raise RuntimeError(
                "the parameters differ between the ranks before the first step, so the replicas would never be the "
                f"same: {differing(channel, self._describe_parameters())}. Wrap the model in DistributedDataParallel "
                "(accelerator.prepare does), which sends rank 0's parameters to all, or load the same weights on every "
                "rank."
            )
        if self._checking_gradients and any(other.gradients for other in openings):
            if all(other.gradients == opening.gradients for other in openings):
                raise RuntimeError(
                    f"all {channel.size} workers have exactly the same gradients, so their votes say nothing. Either "
                    "the gradients were averaged before the step (DDP still all-reduces: call "
                    "hf_dlion.keep_gradients_local before accelerator.prepare, or use DLionTrainer), or every worker "
                    "was given the same data (shard the data loader: accelerator.prepare does)."
                )
            self._checking_gradients = False
        self.opened = True
        return all(other.compiled for other in openings)

    def _note(self, bad_gradient: int, parameters: Sequence[Tensor]) -> Tensor:
        every, step = self.check_replicas_every, self.param_groups[0][STEP]
        due = every and step and step % every == 0
        compared = checksum(parameters) if due else 0
        return Note(digest(self._describe_settings()), bad_gradient, compared).pack(parameters[0].device)

    def _voters(self, channel: Channel, notes: Sequence[Note]) -> list[int]:
        """The ranks that do not abstain, the same on all ranks; none, where a gradient scaler overflowed on all.

        Raises:
            RuntimeError: hyperparameters or parameters differ between the ranks.
            FloatingPointError: a bad gradient is to be raised, or all ranks have one and no gradient scaler.
        """
        if any(note.settings != notes[0].settings for note in notes):
            raise RuntimeError(
                f"the ranks have different hyperparameters: {differing(channel, self._describe_settings())}. "
                "Set them, and step the scheduler, alike on every rank."
            )
        if any(note.parameters != notes[0].parameters for note in notes):
            raise RuntimeError(
                f"the parameters are no longer the same on all ranks at step {self.param_groups[0][STEP]}: "
                f"{differing(channel, self._describe_parameters())}. Something has changed them on some ranks only, or "
                "their hardware rounds differently. Resume from a checkpoint of before, on hardware of one kind."
            )
        voters = [rank for rank, note in enumerate(notes) if note.bad_gradient < 0]
        self._raise_for_bad({rank: note.bad_gradient for rank, note in enumerate(notes) if note.bad_gradient >= 0})
        self.abstentions += len(notes) - len(voters)
        return voters

    @property
    def _scaled(self) -> bool:
        """Whether a gradient scaler calls, to whom an overflow is nothing special."""
        return self.found_inf is not None

    def _check_alone(self, bad: int) -> None:
        """What is checked at a step of one worker alone."""
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        alone = self.process_group is None and not dist.is_initialized()
        if launched > 1 and alone and dist.is_torchelastic_launched():
            raise RuntimeError(
                f"this is one of {launched} processes that were launched together, without a process group: each "
                "would train for itself. First create an accelerate.Accelerator, or call "
                "torch.distributed.init_process_group."
            )
        self._raise_for_bad({0: bad} if bad >= 0 else {})

    def _raise_for_bad(self, bad: dict[int, int]) -> None:
        """Raise FloatingPointError where these bad gradients, by rank, do not only lead to abstentions."""
        everywhere = len(bad) == self.workers
        self._overflows = self._overflows + 1 if everywhere and self._scaled else 0
        if self._scaled:
            fatal = self._overflows == _MOST_OVERFLOWS
        else:
            fatal = everywhere or (bool(bad) and self.on_bad_gradient == "raise")
        if fatal:
            rank, index = next(iter(bad.items()))
            so_often = f"all workers overflowed in {_MOST_OVERFLOWS} steps in a row; " if self._scaled else ""
            raise FloatingPointError(f"{so_often}rank {rank}: {self._describe_bad(index)}")

    def _describe_layout(self) -> dict[str, Any]:
        described: dict[str, Any] = {"method": type(self).__name__, **self.options()}
        described["the number of param groups"] = len(self.param_groups)
        for index, parameter in enumerate(self._all_parameters()):
            described[f"parameter {index}"] = (
                f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}, strides {parameter.stride()}"
            )
        described |= {f"the size of param group {i}": len(g["params"]) for i, g in enumerate(self.param_groups)}
        return described

    def _describe_parameters(self) -> dict[str, Any]:
        parameters = self._all_parameters()
        return {f"the checksum of {self._name(i)}": checksum([p]) for i, p in enumerate(parameters)}

    def _describe_settings(self) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for index, group in enumerate(self.param_groups):
            for name in (STEP, *self.settings()):
                value = group[name]
                described[f"{name} of param group {index}"] = float(value) if isinstance(value, Tensor) else value
        return described

    def _describe_bad(self, index: int) -> str:
        shape = tuple(self._all_parameters()[index].shape)
        return (
            f"the gradient of {self._name(index)}, shape {shape}, has a NaN or Inf at step "
            f"{self.param_groups[0][STEP]}. Look for a too large learning rate, a division by zero in the loss, or a "
            "batch without targets."
        )

    def _name(self, index: int) -> str:
        given = [name for group in self.param_groups for name in group.get("param_names", ())]
        name = next(iter((self.parameter_names or given)[index : index + 1]), "")
        return f"parameter {index} ({name})" if name else f"parameter {index}"


def check_range(name: str, value: Any, what: str, below: float = float("inf")) -> None:
    """Raise ValueError unless 0 <= value < below."""
    if not 0 <= float(value) < below:
        raise ValueError(f"{name}={value}: {what}")


def check_betas(betas: Sequence[float]) -> None:
    """Raise ValueError unless these are two decays."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas={betas}: there are two, each at least 0 and less than 1.")


def _check_parameter(parameter: Tensor, device: torch.device) -> None:
    if parameter.layout != torch.strided or not parameter.is_floating_point():
        raise ValueError(
            f"a parameter of dtype {parameter.dtype}, layout {parameter.layout}, shape {tuple(parameter.shape)}: the "
            "sign of an update is defined for dense, real floating-point parameters. Leave others out of the optimizer."
        )
    if parameter.device != device:
        raise ValueError(
            f"parameters on {device} and on {parameter.device}: one worker holds all its parameters on one device. "
            "Models spread over devices are not supported; use more workers, or LoRA."
        )
    memory_order(parameter)
