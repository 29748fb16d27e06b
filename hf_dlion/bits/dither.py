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


def vote_bits(values: Tensor, zero_votes: Tensor, elements: Tensor, width: Tensor | None, seed: int) -> Tensor:
    """Whether each votes for +1, bool ``[E]``.

    Args:
        values: float32 ``[E]``.
        zero_votes: bool ``[E]``, what exact zeros vote.
        elements: int32 ``[E]``, the place of each value in its parameter.
        width: float32 scalar tensor, w; None for no noise.
        seed: another one for each worker, step and parameter; below 2^31.
    """
    moved = values
    if width is not None:
        # An int32 over 2^31 is uniform in [-1, 1].
        moved = scatter(elements, seed).float().mul_(2.0**-31).mul_(width).add_(values)
    return torch.where(values == 0, zero_votes, moved > 0)
