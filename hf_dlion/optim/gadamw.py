"""G-AdamW, global AdamW: AdamW on the averaged gradient (Liu et al., NeurIPS 2024, arXiv 2404.00438)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from .mean_gradient import DenseMean
from .workers import WorkersOptions


class GlobalAdamW(DenseMean):
    """AdamW (Loshchilov & Hutter, 2019, arXiv 1711.05101) on the mean of the workers' gradients.

    What DDP with ``torch.optim.AdamW`` computes, but for the order of sums; its traffic is in the ledger.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[WorkersOptions],
    ) -> None:
        super().__init__(params, lr, weight_decay, rule="adamw", betas=betas, eps=eps, **options)
