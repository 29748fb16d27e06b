"""G-Lion, global Lion: Lion on the averaged gradient (Liu et al., NeurIPS 2024, arXiv 2404.00438)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from .mean_gradient import DenseMean
from .workers import WorkersOptions


class GlobalLion(DenseMean):
    """Lion (Chen et al., 2023, arXiv 2302.06675) on the mean of the workers' gradients.

    Arguments as in :class:`DistributedLion`.
    """

    bounded_by_decay = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        **options: Unpack[WorkersOptions],
    ) -> None:
        super().__init__(params, lr, weight_decay, rule="lion", betas=betas, **options)
