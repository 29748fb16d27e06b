"""Signs to words and back.

A block is 1024 signs, seen as 32 rows of 32 lanes; it becomes 32 int32 words, and bit k of word j is the sign in row
k, lane j. Packing therefore reads whole rows and needs no shuffle. Blocks are this small so that a tensor of any
size splits into blocks with little padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

LANES = 32
"""Words a block, and bits a word."""

BLOCK = LANES * LANES
"""Signs a block."""

_LOW_BITS = 0x0101010101010101


def pack_bits(bits: Tensor, out: Tensor) -> None:
    """Pack booleans into words.

    Eight booleans are eight bytes of one int64, so rows 8q to 8q + 7 are merged by shifts and sums on an eighth of
    the elements, and give byte q of every word.

    Args:
        bits: bool, ``[blocks, 32, 32]``, contiguous.
        out: int32, ``[blocks, 32]``, contiguous; overwritten.
    """
    shifts = torch.arange(8, device=bits.device).view(1, 1, 8, 1)
    rows = bits.view(torch.int64).view(-1, 4, 8, 4)
    merged = (rows << shifts).sum(2)
    out.copy_(merged.view(torch.uint8).view(-1, 4, LANES).transpose(1, 2).contiguous().view(torch.int32).squeeze(2))


def unpack_bits(words: Tensor) -> Tensor:
    """The inverse of :func:`pack_bits`.

    Args:
        words: int32, ``[blocks, 32]``.

    Returns:
        uint8 zeros and ones, ``[blocks, 32, 32]``.
    """
    shifts = torch.arange(8, device=words.device).view(1, 1, 8, 1)
    rows = words.contiguous().view(torch.uint8).view(-1, LANES, 4).transpose(1, 2).contiguous()
    spread = (rows.view(torch.int64).view(-1, 4, 1, 4) >> shifts) & _LOW_BITS
    return spread.view(torch.uint8).view(-1, LANES, LANES)
