"""Rounding float32 to bfloat16 at random, without bias and the same on every rank.

An update below half a unit in the last place is lost by rounding to nearest; here it is made in a share of the steps
that is its size in units. The randomness is a hash of step and place, so that every rank rounds alike and none needs
memory for it.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .hashing import digest, scatter, scatter_number


def rounding_seed(step: int, parameter: int, start: int, device: torch.device) -> Tensor:
    """Int32 ``[1]``, for elements of a parameter from ``start`` on at that step."""
    seed = scatter_number(place_of(parameter, start), step) & 0x7FFFFFFF
    return torch.full((1,), seed, dtype=torch.int32, device=device)  # filled, not copied: a copy would wait for a GPU


@functools.cache
def place_of(parameter: int, start: int) -> int:
    """What :func:`rounding_seed` mixes the step into; below 2^31."""
    return digest((parameter, start)) & 0x7FFFFFFF


def round_at_random(values: Tensor, elements: Tensor, seed: Tensor) -> Tensor:
    """To one of the two next bfloat16 numbers: the further one with a chance that is the distance to the nearer one.

    Args:
        values: float32, finite.
        elements: int32, of the shape of ``values``: a different number for each.
        seed: int32 ``[1]``.

    Returns:
        bfloat16, of that shape.
    """
    noise = scatter(elements, seed) & 0xFFFF
    # bfloat16 is the upper half of float32: noise carries into it with a chance that is the lower half.
    return ((values.view(torch.int32) + noise) & -0x10000).view(torch.float32).to(torch.bfloat16)
