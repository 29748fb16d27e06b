"""The methods by the names that ``optim=`` takes. A new method is one file beside this one, and an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.optim import Optimizer

from .dlion import DistributedLion


@dataclass(frozen=True)
class Method:
    """What a name stands for.

    Attributes:
        optimizer: the class.
        summary: a line for ``--help``.
        fixed: keyword arguments that belong to the name.
        options: the keyword arguments that come from the training arguments (``DLionArgumentsMixin``).
    """

    optimizer: type[Optimizer]
    summary: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    options: Callable[[Any], dict[str, Any]] = lambda arguments: {}

    def keywords(self, arguments: Any) -> dict[str, Any]:
        """The keyword arguments of ``optimizer``, but for the parameters and their weight decay."""
        return {"lr": arguments.learning_rate, **self.fixed, **self.options(arguments)}


def _lion_options(arguments: Any) -> dict[str, Any]:
    return {
        "betas": (arguments.lion_beta1, arguments.lion_beta2),
        "tie": arguments.vote_tie,
        "exchange": arguments.vote_exchange,
    }


METHODS: dict[str, Method] = {
    "dlion_mavo": Method(
        DistributedLion, "Distributed Lion, majority vote: 1 bit up", {"aggregation": "mavo"}, _lion_options
    ),
    "dlion_avg": Method(
        DistributedLion, "Distributed Lion, average of the signs: 1 bit up", {"aggregation": "avg"}, _lion_options
    ),
}
