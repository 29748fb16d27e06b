"""Which parameters stand where in the words: cut into blocks, blocks into buckets.

A large parameter is worked on in place, block by block. What does not fill its blocks (the rest of a large parameter,
and every small one) is staged: copied next to each other into blocks shared with others of its group and dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..wire.packing import BLOCK, LANES

MAX_BUCKET_BLOCKS = 1 << 14
"""Blocks a bucket, at most: 16.8 million parameters, 2 MiB of words. Bounds the memory of a step."""

MIN_BUCKET_BLOCKS = 1 << 11
"""Blocks a bucket, at least, where there are several to overlap: 2.1 million parameters, 256 KiB of words."""

SEGMENT_BLOCKS = 1 << 9
"""Blocks a segment, at most: gradient and momentum then stay in a CPU's cache while they are read twice."""

DIRECT_BLOCKS = 16
"""A parameter with fewer whole blocks is staged: a kernel call costs more than a copy."""


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``start + length`` of a parameter, in memory order."""

    parameter: int
    start: int
    length: int


@dataclass
class Segment:
    """Blocks that one kernel call works on: a piece worked on in place, or several, staged.

    Attributes:
        group: index of the param group.
        pieces: what is in it, in order.
        blocks: how many blocks.
        first: its first block in the bucket.
        dtype: of the pieces.
        staged: whether the pieces are copied together first.
    """

    group: int
    pieces: tuple[Piece, ...]
    blocks: int
    first: int
    dtype: torch.dtype
    staged: bool

    @functools.cached_property
    def rows(self) -> slice:
        """Its place among the bucket's blocks."""
        return slice(self.first, self.first + self.blocks)

    @functools.cached_property
    def places(self) -> list[slice]:
        """Where each piece lies among the segment's elements."""
        ends = list(itertools.accumulate(piece.length for piece in self.pieces))
        return [slice(end - piece.length, end) for piece, end in zip(self.pieces, ends, strict=True)]


@dataclass
class Bucket:
    """What is exchanged at once."""

    segments: list[Segment] = field(default_factory=list)
    blocks: int = 0

    @property
    def words(self) -> int:
        """W, the int32 words that its signs take."""
        return self.blocks * LANES

    @property
    def padding_share(self) -> float:
        """Which part of its signs belongs to no parameter."""
        elements = sum(piece.length for segment in self.segments for piece in segment.pieces)
        return 1 - elements / (self.blocks * BLOCK)

    def add(self, group: int, pieces: tuple[Piece, ...], blocks: int, dtype: torch.dtype, staged: bool) -> None:
        """Append a segment."""
        self.segments.append(Segment(group, pieces, blocks, self.blocks, dtype, staged))
        self.blocks += blocks


def make_buckets(groups: Sequence[Sequence[tuple[int, Tensor]]], count: int) -> list[Bucket]:
    """Lay out the parameters of all groups, the same on every rank.

    Args:
        groups: for each param group its parameters, each with its index over all groups.
        count: how many buckets there should be, if they are not too small or too large then.
    """
    buckets = [Bucket()]
    blocks = sum(-(-parameter.numel() // BLOCK) for members in groups for _, parameter in members)
    limit = min(max(-(-blocks // count), MIN_BUCKET_BLOCKS), MAX_BUCKET_BLOCKS)

    def append(group: int, pieces: tuple[Piece, ...], blocks: int, dtype: torch.dtype, staged: bool) -> None:
        if buckets[-1].blocks + blocks > limit:
            buckets.append(Bucket())
        buckets[-1].add(group, pieces, blocks, dtype, staged)

    for group, members in enumerate(groups):
        rests: dict[torch.dtype, list[Piece]] = {}
        for index, parameter in members:
            whole = parameter.numel() // BLOCK
            start = 0
            if whole >= DIRECT_BLOCKS:
                while whole:
                    blocks = min(whole, SEGMENT_BLOCKS)
                    append(group, (Piece(index, start, blocks * BLOCK),), blocks, parameter.dtype, staged=False)
                    start += blocks * BLOCK
                    whole -= blocks
            if start < parameter.numel():
                rests.setdefault(parameter.dtype, []).append(Piece(index, start, parameter.numel() - start))
        for dtype, pieces in rests.items():
            for part in _batches(pieces, SEGMENT_BLOCKS * BLOCK):
                length = sum(piece.length for piece in part)
                append(group, tuple(part), -(-length // BLOCK), dtype, staged=True)
    return [bucket for bucket in buckets if bucket.blocks]


def _batches(pieces: Sequence[Piece], limit: int) -> Iterator[list[Piece]]:
    """Consecutive pieces of at most ``limit`` elements together."""
    batch: list[Piece] = []
    length = 0
    for piece in pieces:
        if batch and length + piece.length > limit:
            yield batch
            batch, length = [], 0
        batch.append(piece)
        length += piece.length
    if batch:
        yield batch


def memory_order(tensor: Tensor) -> tuple[int, ...]:
    """The permutation of the dimensions that makes a dense tensor contiguous.

    Raises:
        ValueError: the tensor has holes or overlaps itself.
    """
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.dim()), key=lambda i: (-strides[i], -tensor.shape[i], i)))
    if not tensor.permute(order).is_contiguous():
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not dense in memory, and "
            "cannot be updated in place. Replace it by `parameter.contiguous()` before making the optimizer."
        )
    return order
