"""Distributed Signum (Bernstein et al., 2018, arXiv 1802.04434, Algorithm 2 with momentum)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from .dlion import DistributedLion, VoteOptions


class DistributedSignum(DistributedLion):
    """SignSGD with momentum and a vote: what travels is the sign of the momentum.

    With worker i's momentum m_i and its own gradient g_i::

        m_i = momentum * m_i + (1 - momentum) * g_i
        d_i = sign(m_i)

    and the rest as in :class:`DistributedLion`: this is Lion with both decays the same, since the direction then is
    the momentum to be. Other arguments, errors and state as there.

    Args:
        momentum: the decay, in [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        aggregation: str = "mavo",
        tie: str = "zero",
        exchange: str = "auto",
        **options: Unpack[VoteOptions],
    ) -> None:
        super().__init__(
            params,
            lr,
            (momentum, momentum),
            weight_decay,
            aggregation=aggregation,
            tie=tie,
            exchange=exchange,
            **options,
        )
