"""Gradient Dropping (Aji & Heafield, EMNLP 2017, arXiv 1704.05021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from typing_extensions import Unpack, override

from ..wire.collectives import Channel
from ..wire.conversation import Conversation
from .mean_gradient import MeanGradient, RuleOptions, Share
from .sparse import RESIDUAL, sum_largest
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
        options: as in :class:`MeanGradient`.
    """

    whole_parameters = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        drop: float = 0.96,
        momentum: float = 0.9,
        **options: Unpack[RuleOptions],
    ) -> None:
        check_range("drop", drop, "it is a share, at least 0 and less than 1.", below=1)
        self.drop = drop
        super().__init__(params, lr, weight_decay, momentum=momentum, local_state=(RESIDUAL,), **options)

    @override
    def _sum(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        residuals = [state[RESIDUAL] for state in share.states]
        for residual, gradient in zip(residuals, share.gradients, strict=True):
            residual.add_(gradient)
        total, _ = yield from sum_largest(channel, voters, residuals, 1 - self.drop)
        return total

    @override
    def options(self) -> dict[str, Any]:
        return super().options() | {"drop": self.drop}
