"""One bit for a gradient, drawn so that its mean says how large the gradient is.

The sign of g + w n, n uniform in [-1, 1], is +1 with the chance (1 + g / w) / 2 where ``|g| <= w``: its mean is g / w
there, and the sign of g beyond. A plain sign says the same of a gradient of any size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hashing import scatter

WIDTH = 2.0
"""w, in root mean squares of the gradient of a parameter."""


def dithered(values: Tensor, width: Tensor, elements: Tensor, seed: int) -> Tensor:
    """The values with noise added; exact zeros stay.

    Args:
        values: float32 ``[E]``.
        width: float32 scalar tensor, w.
        elements: int32 ``[E]``, the place of each value in its parameter.
        seed: another one for each worker, step and parameter; below 2^31.
    """
    noise = scatter(elements, seed).float().mul_(2.0**-31)  # of int32, so uniform in [-1, 1]
    return torch.where(values == 0, values, values + width * noise)


def vote_bits(values: Tensor, elements: Tensor, turn: int) -> Tensor:
    """Whether each votes for +1. A zero does so where place and turn are odd together: its votes cancel.

    Args:
        values: float32 ``[E]``.
        elements: int32 ``[E]``, as of :func:`dithered`.
        turn: rank and step together.
    """
    return (values > 0) | ((values == 0) & (((elements + turn) & 1) > 0))
