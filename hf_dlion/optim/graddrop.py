"""Gradient Dropping (Aji & Heafield, EMNLP 2017, arXiv 1704.05021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..wire.collectives import Channel
from .mean_gradient import MeanGradient, RuleOptions
from .sparse import RESIDUAL, largest, sum_chosen
from .workers import check_range


class GradDrop(MeanGradient):
    """Workers send the largest entries of their gradients, and keep the rest for later.

    For each parameter of worker i::

        r_i = r_i + g_i
        s_i = r_i where |r_i| is among the (1 - drop) * d largest, else 0      # what travels: indices and values
        r_i = r_i - s_i
        g   = 1/N * sum_i s_i                                                  # the gradient of the rule

    Thresholds are local: one a parameter, found exactly.

    Args:
        params, lr, weight_decay: as in :class:`MeanGradient`.
        drop: share of the entries that are not sent, in [0, 1). At least one entry of a parameter is.
        momentum: of the default rule, SGD.
        shared: as in :class:`MeanGradient`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        drop: float = 0.96,
        momentum: float = 0.9,
        **shared: Unpack[RuleOptions],
    ) -> None:
        check_range("drop", drop, "it is a share, at least 0 and less than 1.", below=1)
        self.drop = drop
        super().__init__(params, lr, weight_decay, momentum=momentum, local_state=(RESIDUAL,), **shared)

    def _sum(
        self,
        channel: Channel | None,
        voters: Sequence[int],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> Tensor:
        indices, values, offset = [], [], 0
        for gradient, state in zip(gradients, states, strict=True):
            residual = state[RESIDUAL].add_(gradient.view(state[RESIDUAL].shape)).view(-1)
            chosen = largest(residual, 1 - self.drop)
            indices.append(chosen + offset)
            values.append(residual[chosen])
            residual[chosen] = 0
            offset += len(gradient)
        return sum_chosen(channel, voters, indices, values, offset)

    def options(self) -> dict[str, Any]:
        """Options that must be the same on all ranks, besides hyperparameters."""
        return super().options() | {"drop": self.drop}
