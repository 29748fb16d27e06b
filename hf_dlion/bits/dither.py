"""One bit for a gradient, drawn so that its mean says how large the gradient is; and what is decided, as gradients.

The sign of g + w n, n uniform in [-1, 1], is +1 with the chance (1 + g / w) / 2 where ``|g| <= w``: its mean is g / w
there, and the sign of g beyond. A plain sign says the same of a gradient of any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .hashing import scatter
from .packing import BLOCK, LANES, pack_bits, unpack_bits

WIDTH = 2.0
"""w, in root mean squares of the gradient of a parameter."""


@dataclass(frozen=True)
class Passes:
    """Over the gradients of a bucket, of several parameters one after the other.

    Attributes:
        pack: :func:`pack`, or the same bits otherwise.
        settle: :func:`settle`, likewise.
    """

    pack: Callable[[Tensor, Sequence[int], Sequence[int], Tensor | None, int], Tensor]
    settle: Callable[[Tensor, Sequence[int], Tensor, int, Sequence[Tensor]], None]


def pack(flat: Tensor, sizes: Sequence[int], seeds: Sequence[int], widths: Tensor | None, turn: int) -> Tensor:
    """The votes on gradients, int32 ``[W]``; exact zeros, and padding, vote by turns.

    Args:
        flat: ``[E]``.
        sizes: elements of each parameter, E in all.
        seeds: of its noise: another one for each worker, step and parameter; below 2^31.
        widths: float32 ``[parameters]``, w of each; None for no noise.
        turn: the next one is the other way round.
    """
    padded = -(-len(flat) // BLOCK) * BLOCK
    bits = torch.empty(padded, dtype=torch.bool, device=flat.device)
    chunk = _chunk(flat)
    counting = torch.arange(chunk, dtype=torch.int32, device=flat.device)
    alternating = (counting & 1) > 0
    for place, first, where in _pieces(sizes, chunk):
        values = flat[where].float()
        zero_votes = alternating[: len(values)] ^ bool(first + turn & 1)
        moved = values
        if widths is not None:
            # An int32 over 2^31 is uniform in [-1, 1].
            noise = scatter(counting[: len(values)] + first, seeds[place]).float().mul_(2.0**-31)
            moved = noise.mul_(widths[place]).add_(values)
        bits[where] = torch.where(values == 0, zero_votes, moved > 0)
    bits[len(flat) :] = alternating[: padded - len(flat)] ^ bool(turn & 1)
    words = torch.empty(padded // 32, dtype=torch.int32, device=flat.device)
    for some, out in zip(bits.split(chunk), words.split(chunk // 32), strict=True):
        pack_bits(some.view(-1, LANES, LANES), out.view(-1, LANES))
    return words


def settle(flat: Tensor, sizes: Sequence[int], scales: Tensor, highest: int, planes: Sequence[Tensor]) -> None:
    """Put (2c - n) / n of each element, times the scale of its parameter, into a bucket.

    Args:
        flat: ``[E]``; overwritten.
        sizes: elements of each parameter, E in all.
        scales: float32 ``[parameters]``.
        highest: n.
        planes: the bits of c, int32 ``[W]`` each, the lowest first.
    """
    chunk = _chunk(flat)
    chunks = [plane.split(chunk // 32) for plane in planes]
    levels, current = flat, -1
    for place, _, where in _pieces(sizes, chunk):
        if where.start // chunk != current:
            current = where.start // chunk
            levels = _levels([plane[current] for plane in chunks], highest)
        offset = current * chunk
        flat[where] = levels[where.start - offset : where.stop - offset] * scales[place]


EAGER = Passes(pack, settle)


def _chunk(tensor: Tensor) -> int:
    """Elements that are worked on at once: what stays in a CPU's cache, or what keeps a GPU busy."""
    return BLOCK * (128 if tensor.device.type == "cpu" else 4096)


def _pieces(sizes: Sequence[int], chunk: int) -> Iterator[tuple[int, int, slice]]:
    """The parts of a bucket cut where its chunks end: place of the part, first element in it, place in the bucket."""
    begin = 0
    for place, size in enumerate(sizes):
        end = begin + size
        start = begin
        while start < end:
            stop = min(end, (start // chunk + 1) * chunk)
            yield place, start - begin, slice(start, stop)
            start = stop
        begin = end


def _levels(planes: Sequence[Tensor], highest: int) -> Tensor:
    """(2c - n) / n of each element, float32."""
    counted = unpack_bits(planes[0].view(-1, LANES)).float()
    for bit, plane in enumerate(planes[1:], 1):
        counted.add_(unpack_bits(plane.view(-1, LANES)), alpha=1 << bit)
    # By a tensor, since a GPU multiplies by the inverse of a number of Python's.
    return counted.mul_(2).sub_(highest).div_(counted.new_full((), highest)).flatten()
