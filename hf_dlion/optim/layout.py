"""Which parameters stand where in the words: cut into blocks, blocks into buckets.

A large parameter is worked on in place, block by block. What does not fill its blocks (the rest of a large parameter,
and every small one) is staged: copied next to each other into blocks shared with others of its group and dtype.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..bits.packing import BLOCK

MAX_BUCKET_BLOCKS = 1 << 14
"""Blocks a bucket, at most: 16.8 million parameters, 2 MiB of words. Bounds the memory of a step."""

MIN_BUCKET_BLOCKS = 1 << 11
"""Blocks a bucket, at least, where there are several to overlap: 2.1 million parameters, 256 KiB of words."""

SEGMENT_BLOCKS = 1 << 9
"""Blocks a segment, at most: gradient and momentum then stay in a CPU's cache while they are read twice."""

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


@dataclass
class Segment:
    """Blocks that one kernel call works on: a span worked on in place, or several, staged.

    Attributes:
        group: index of the param group.
        spans: what is in it, in order.
        blocks: how many blocks.
        first_block: its first block in the bucket.
        dtype: of the spans.
        staged: whether the spans are copied together first.
    """

    group: int
    spans: tuple[Span, ...]
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
        ends = list(itertools.accumulate(span.length for span in self.spans))
        return [slice(end - span.length, end) for span, end in zip(self.spans, ends, strict=True)]


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
        return 1 - elements / (self.blocks * BLOCK)

    def add(self, group: int, spans: tuple[Span, ...], blocks: int, dtype: torch.dtype, staged: bool) -> None:
        """Append a segment."""
        self.segments.append(Segment(group, spans, blocks, self.blocks, dtype, staged))
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

    def append(group: int, spans: tuple[Span, ...], blocks: int, dtype: torch.dtype, staged: bool) -> None:
        if buckets[-1].blocks + blocks > limit:
            buckets.append(Bucket(len(buckets)))
        buckets[-1].add(group, spans, blocks, dtype, staged)

    for group, members in enumerate(groups):
        remainders: dict[torch.dtype, list[Span]] = {}
        for index, parameter in members:
            whole = parameter.numel() // BLOCK
            start = 0
            if whole >= DIRECT_BLOCKS:
                while whole:
                    blocks = min(whole, SEGMENT_BLOCKS)
                    append(group, (Span(index, start, blocks * BLOCK),), blocks, parameter.dtype, staged=False)
                    start += blocks * BLOCK
                    whole -= blocks
            if start < parameter.numel():
                remainders.setdefault(parameter.dtype, []).append(Span(index, start, parameter.numel() - start))
        for dtype, spans in remainders.items():
            for part in batches(spans, SEGMENT_BLOCKS * BLOCK):
                length = sum(span.length for span in part)
                append(group, tuple(part), -(-length // BLOCK), dtype, staged=True)
    return [bucket for bucket in buckets if bucket.blocks]


def last_buckets(buckets: Sequence[Bucket], parameters: int) -> list[int]:
    """The number of the last bucket with a part of each of so many parameters; -1 of one without elements."""
    last = [-1] * parameters
    for bucket in buckets:
        for parameter in bucket.parameters:
            last[parameter] = bucket.number
    return last


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
