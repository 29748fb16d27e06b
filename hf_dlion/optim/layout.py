"""Which parameters stand where in the words: cut into blocks, blocks into buckets.

A large parameter is worked on in place, block by block. What does not fill its blocks (the rest of a large parameter,
and every small one) is staged: copied next to each other into blocks shared with others of its group and dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bits.packing import BLOCK

MAX_BUCKET_BLOCKS = 1 << 14
"""Blocks a bucket, at most: 16.8 million parameters, 2 MiB of words. Bounds the memory of a step."""

GPU_BUCKETS = 2
"""How many times as large buckets are on a GPU: there, what a launch costs counts, and memory is plentiful."""

MIN_BUCKET_BLOCKS = 1 << 11
"""Blocks a bucket, at least, where there are several to overlap: 2.1 million parameters, 256 KiB of words."""

SEGMENT_BLOCKS = 1 << 11
"""Blocks a segment, at most: what a kernel call costs is then little beside its work, and buckets are still full."""

DIRECT_BLOCKS = 16
"""A parameter with fewer whole blocks is staged: a kernel call costs more than a copy."""


@dataclass(frozen=True)
class Span:
    """Elements ``start`` to ``start + length`` of a parameter, in memory order."""

    parameter: int
    start: int
    length: int

    def of(self, flat: Tensor) -> Tensor:
        """Its elements of the flat parameter, as a view."""
        return flat[self.start : self.start + self.length]


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``start + length`` of a parameter, that are laid out in one way.

    Attributes:
        parity: of the place among its segment's elements at which the first has to stand; None: any. The votes of zero
            and the ties that alternate follow the parity of an element's place.
    """

    start: int
    length: int
    parity: int | None = None


@dataclass
class Segment:
    """Blocks that one kernel call works on: a span worked on in place, or several, staged.

    Attributes:
        group: index of the param group.
        spans: what is in it, in order.
        starts: where each span begins among the segment's elements.
        blocks: how many blocks.
        first_block: its first block in the bucket.
        dtype: of the spans.
        staged: whether the spans are copied together first.
    """

    group: int
    spans: tuple[Span, ...]
    starts: tuple[int, ...]
    blocks: int
    first_block: int
    dtype: torch.dtype
    staged: bool

    @functools.cached_property
    def rows(self) -> slice:
        """Its place among the bucket's blocks."""
        return slice(self.first_block, self.first_block + self.blocks)

    @functools.cached_property
    def slices(self) -> list[slice]:
        """Where each span lies among the segment's elements."""
        return [slice(start, start + span.length) for start, span in zip(self.starts, self.spans, strict=True)]


@dataclass
class Bucket:
    """What is exchanged at once; its number is its place among the buckets."""

    number: int = 0
    segments: list[Segment] = field(default_factory=list)
    blocks: int = 0

    @functools.cached_property
    def parameters(self) -> list[int]:
        """The indices of the parameters with a part in it."""
        return sorted({span.parameter for segment in self.segments for span in segment.spans})

    @property
    def padding(self) -> float:
        """Which part of its signs belongs to no parameter."""
        elements = sum(span.length for segment in self.segments for span in segment.spans)
        return 1 - elements / (self.blocks * BLOCK) if self.blocks else 0.0

    def add(
        self,
        group: int,
        spans: tuple[Span, ...],
        starts: tuple[int, ...],
        blocks: int,
        dtype: torch.dtype,
        staged: bool,
    ) -> None:
        """Append a segment."""
        self.segments.append(Segment(group, spans, starts, blocks, self.blocks, dtype, staged))
        self.blocks += blocks


def make_buckets(
    groups: Sequence[Sequence[tuple[int, Tensor]]], count: int, pieces: Sequence[Sequence[Piece]] | None = None
) -> list[Bucket]:
    """Lay out the parameters of all groups, the same on every rank.

    Args:
        groups: for each param group its parameters, each with its index over all groups.
        count: how many buckets there should be, if they are not too small or too large then.
        pieces: by index, how each parameter is to be taken apart; None: it is not.

    Returns:
        At least one bucket, which is without blocks if there are no elements: what goes with the votes still travels.
    """
    buckets = [Bucket()]
    blocks = sum(-(-parameter.numel() // BLOCK) for members in groups for _, parameter in members)
    on_gpu = any(parameter.device.type == "cuda" for members in groups for _, parameter in members)
    limit = blocks_a_bucket(blocks, count, on_gpu)

    def append(group: int, spans: list[Span], starts: list[int], dtype: torch.dtype, staged: bool) -> None:
        blocks = -(-(starts[-1] + spans[-1].length) // BLOCK)
        if buckets[-1].blocks and buckets[-1].blocks + blocks > limit:
            buckets.append(Bucket(len(buckets)))
        buckets[-1].add(group, tuple(spans), tuple(starts), blocks, dtype, staged)

    parities: dict[Span, int | None] = {}
    remainders: dict[tuple[int, torch.dtype], list[Span]] = {}
    for group, members in enumerate(groups):
        for index, parameter in members:
            for piece in [Piece(0, parameter.numel())] if pieces is None else pieces[index]:
                in_place, staged = _spans(index, piece)
                for span in in_place:
                    append(group, [span], [0], parameter.dtype, staged=False)
                remainders.setdefault((group, parameter.dtype), []).extend(staged)
                parities |= dict.fromkeys(staged, piece.parity)  # all begin an even number of elements further on
    # Last, as they are of all layers: the other buckets are complete as soon as backward has passed a few layers.
    for (group, dtype), spans in remainders.items():
        for part in batches(spans, SEGMENT_BLOCKS * BLOCK):
            append(group, part, _starts(part, parities), dtype, staged=True)
    return buckets


def blocks_a_bucket(blocks: int, count: int, on_gpu: bool) -> int:
    """How large a bucket is at most, where all together have so many blocks, and so many buckets are asked for."""
    return min(max(-(-blocks // count), MIN_BUCKET_BLOCKS), MAX_BUCKET_BLOCKS * (GPU_BUCKETS if on_gpu else 1))


def fills_several(elements: int) -> bool:
    """Whether so many elements make several buckets, where there should be."""
    return elements > MIN_BUCKET_BLOCKS * BLOCK


def _spans(parameter: int, piece: Piece) -> tuple[list[Span], list[Span]]:
    """What of a piece is worked on in place, and what is staged."""
    size, end = SEGMENT_BLOCKS * BLOCK, piece.start + piece.length
    # In place, an element's place is its number in the piece.
    whole = piece.length // BLOCK if not piece.parity else 0
    middle = piece.start + (whole * BLOCK if whole >= DIRECT_BLOCKS else 0)
    in_place = [Span(parameter, start, min(size, middle - start)) for start in range(piece.start, middle, size)]
    return in_place, [Span(parameter, start, min(size, end - start)) for start in range(middle, end, size)]


def _starts(spans: Sequence[Span], parities: Mapping[Span, int | None]) -> list[int]:
    """Where spans stand that are staged one after the other, an element apart where their parity asks for it."""
    starts, place = [], 0
    for span in spans:
        parity = parities[span]
        place += parity is not None and place % 2 != parity
        starts.append(place)
        place += span.length
    return starts


def buckets_of(buckets: Sequence[Bucket], parameters: int) -> list[list[int]]:
    """The numbers of the buckets with a part of each of so many parameters, ascending; none of one without elements."""
    found: list[list[int]] = [[] for _ in range(parameters)]
    for bucket in buckets:
        for parameter in bucket.parameters:
            found[parameter].append(bucket.number)
    return found


def cut(sizes: Sequence[int], limit: int | None) -> Iterator[Span]:
    """The spans of parameters of these sizes, in order: of at most ``limit`` elements, or whole ones with None."""
    for index, size in enumerate(sizes):
        for start in range(0, size, limit or max(size, 1)):
            yield Span(index, start, min(limit or size, size - start))


def batches(spans: Iterable[Span], limit: int) -> Iterator[list[Span]]:
    """Consecutive spans of at most ``limit`` elements together."""
    batch: list[Span] = []
    length = 0
    for span in spans:
        if batch and length + span.length > limit:
            yield batch
            batch, length = [], 0
        batch.append(span)
        length += span.length
    if batch:
        yield batch
