"""How far workers have come, in one bit an element and a scale for each block of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..bits.kernels import pack_signs
from ..bits.packing import BLOCK, LANES, unpack_bits
from ..wire.conversation import Conversation
from ..wire.exchange import Ballot, Exchange
from .layout import Span

SCALED = 256
"""Elements of a parameter that share a scale."""


def blocks_of(parameter: Tensor) -> int:
    """How many scales it has."""
    return -(-parameter.numel() // SCALED)


def magnitudes(displacement: Tensor | None, parameter: Tensor) -> Tensor:
    """The mean magnitude in each block of a flat tensor, in the memory order of its parameter; zeros for None."""
    size, blocks = parameter.numel(), blocks_of(parameter)
    if displacement is None:
        return torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
    sums = pad(displacement, (0, blocks * SCALED - size)).view(blocks, SCALED).abs().sum(1)
    return sums.div_((size - SCALED * torch.arange(blocks, device=parameter.device)).clamp(max=SCALED))


def of_elements(scales: Tensor, span: Span) -> Tensor:
    """The scale of each element of a span, which begins with a block."""
    first = span.start // SCALED
    last = first + -(-span.length // SCALED)
    return scales[first:last].repeat_interleave(SCALED)[: span.length]


def decide(
    exchange: Exchange, rank: int, voters: Sequence[int], displacement: Tensor, number: int
) -> Conversation[Tensor]:
    """D, float32 ``[d]``, from -1 to 1: what the workers decide by the signs of what they moved by.

    Args:
        exchange: of the votes.
        rank: of this worker.
        voters: whose votes count.
        displacement: this worker's, float32 ``[d]``.
        number: of the vote; what zeros vote, and how ties alternate, depends on it.
    """
    size = len(displacement)
    blocks = -(-size // BLOCK)
    words = torch.empty((blocks, LANES), dtype=torch.int32, device=displacement.device)
    padded = pad(displacement, (0, blocks * BLOCK - size)).view(blocks, LANES, LANES)
    lanes = torch.arange(LANES, device=displacement.device)
    pack_signs(padded, ((lanes + rank + number) & 1).bool(), words)
    ballot = Ballot(words.view(-1), words.new_empty(0), number, 1 - size / (blocks * BLOCK))
    decision = yield from exchange.decide(ballot, lambda headers: voters)
    assert decision is not None
    level = torch.zeros(blocks * BLOCK, dtype=torch.float32, device=displacement.device)
    for weight, plane in enumerate(decision.planes):
        level.add_(unpack_bits(plane.view(blocks, LANES)).view(-1), alpha=1 << weight)
    return level[:size].mul_(2).sub_(decision.highest).div_(decision.highest)
