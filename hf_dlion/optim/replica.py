"""How a worker describes its replica to the others, and to the user: by names, values and checksums."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..bits.hashing import checksum
from ..wire.shards import Shards

STEP = "step"

Layout = Sequence[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]]


@dataclass(frozen=True)
class Replica:
    """What an optimizer holds at one step.

    Attributes:
        method: of the optimizer, as it names itself.
        options: what must be the same on all ranks, besides hyperparameters.
        groups: the param groups.
        hyperparameters: names of those that must be the same on all ranks at every step.
        parameters: of all groups, in order, as far as this process holds them.
        names: of the parameters, empty where one has none; if there are none at all, those of the param groups.
        shards: the ranks that hold it together; None, if this one holds all of it.
        common: what must be the same on all ranks; the parameters, or those of the last vote.
    """

    method: str
    options: dict[str, Any]
    groups: list[dict[str, Any]]
    hyperparameters: tuple[str, ...]
    parameters: list[Tensor]
    names: list[str]
    shards: Shards | None = None
    common: list[Tensor] = field(default_factory=list)

    @functools.cached_property
    def layout(self) -> Layout:
        """What of the parameters their votes are laid out by."""
        return layout_of(self.parameters)

    @property
    def step(self) -> int:
        """How many steps were made."""
        return int(self.groups[0][STEP])

    def describe_method(self) -> dict[str, Any]:
        """Method, options, and the sizes of the param groups."""
        described: dict[str, Any] = {"method": self.method, **self.options}
        described["the number of param groups"] = len(self.groups)
        return described | {f"the size of param group {i}": len(g["params"]) for i, g in enumerate(self.groups)}

    def describe_layout(self) -> dict[str, Any]:
        """As :meth:`describe_method`, with the shapes of the parameters."""
        described = self.describe_method()
        for index, parameter in enumerate(self.parameters):
            device = parameter.device.type  # buckets are larger on a GPU
            described[f"parameter {index}"] = (
                f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}, strides {parameter.stride()}"
            ) + f", on a device of type {device}" * (device != "cpu")
        return described

    def describe_parameters(self) -> dict[str, Any]:
        """Their checksums."""
        return {f"the checksum of {self.name(i)}": checksum([p]) for i, p in enumerate(self.common)}

    def describe_hyperparameters(self) -> dict[str, Any]:
        """The step number, and those of every group."""
        described: dict[str, Any] = {}
        for index, group in enumerate(self.groups):
            for name in (STEP, *self.hyperparameters):
                value = group[name]
                described[f"{name} of param group {index}"] = float(value) if isinstance(value, Tensor) else value
        return described

    def describe_bad_gradient(self, index: int) -> str:
        """What is wrong with the gradient of a parameter, and where to look."""
        whole = [parameter for group in self.groups for parameter in group["params"]][index]
        return (
            f"the gradient of {self.name(index)}, shape {tuple(whole.shape)}, has a NaN or Inf at "
            f"step {self.step}. Look for a too large learning rate, a division by zero in the loss, or a batch without "
            "targets."
        )

    def name(self, index: int) -> str:
        """A parameter by its number, and its name if it has one."""
        names = self.names or [name for group in self.groups for name in group.get("param_names", ())]
        name = next(iter(names[index : index + 1]), "")
        return f"parameter {index} ({name})" if name else f"parameter {index}"


def layout_of(tensors: Sequence[Tensor]) -> Layout:
    """Shape, strides, dtype and device of each."""
    return [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in tensors]
