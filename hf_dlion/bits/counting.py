"""Counting votes without unpacking them.

A count is kept bit-sliced: plane j is a word tensor whose every bit is bit j of the count of one parameter, so one
bitwise operation on an int32 word works on 32 parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RULES = ("avg", "zero", "alternate")


@dataclass(frozen=True)
class Tally:
    """What became of the votes on one part.

    Attributes:
        planes: int32 ``[W]`` each, bit-sliced levels, least significant first. By rule: ``"avg"``, the count of those
            who said yes; ``"zero"``, 0 for no, 1 for a tie, 2 for yes, or without a second plane if the number of
            voters is odd; ``"alternate"``, one plane.
        unanimous: on how many elements of the sample all agreed, an integer or an int64 scalar tensor.
        ties: on how many half said yes.
    """

    planes: list[Tensor]
    unanimous: Tensor | int
    ties: Tensor | int


Count = Callable[[Sequence[Tensor], str, int, range], Tally]
"""As :func:`tally`."""


def count_planes(votes: Sequence[Tensor]) -> list[Tensor]:
    """Count the set bits at each position over several word tensors, by a tree of carry-save adders.

    Three words of one weight become one of that weight (their sum without carry) and one of twice the weight (their
    carries): N words take about N full adders, five operations each.

    Args:
        votes: N >= 1 int32 tensors of one shape.

    Returns:
        ceil(log2(N + 1)) planes, least significant first, each of that shape.
    """
    return add_counts([[vote] for vote in votes], len(votes))


def add_counts(counts: Sequence[Sequence[Tensor]], highest: int) -> list[Tensor]:
    """The sum of bit-sliced counts.

    Args:
        counts: each the planes of one, least significant first, int32 of one shape.
        highest: what the sum can be at most, at least 1.

    Returns:
        As of :func:`count_planes`.
    """
    carries: list[Tensor] = []
    planes: list[Tensor] = []
    for weight in range(highest.bit_length()):
        column = [count[weight] for count in counts if weight < len(count)] + carries
        carries = []
        while len(column) >= 3:
            a, b, c = column.pop(), column.pop(), column.pop()
            half = a ^ b
            column.append(half ^ c)
            carries.append((a & b) | (half & c))
        if len(column) == 2:
            a, b = column
            column = [a ^ b]
            carries.append(a & b)
        planes.append(column[0] if column else torch.zeros_like(counts[0][0]))
    return planes


def reaches(planes: Sequence[Tensor], threshold: int) -> Tensor:
    """Words with a bit set wherever the count is at least ``threshold``, 1 <= threshold < 2^planes."""
    # From the lowest set bit of the threshold up: there, and above it where the higher bits are equal.
    lowest = (threshold & -threshold).bit_length() - 1
    result = planes[lowest]
    for j in range(lowest + 1, len(planes)):
        result = result & planes[j] if threshold >> j & 1 else result | planes[j]
    return result


def equals(planes: Sequence[Tensor], value: int) -> Tensor:
    """Words with a bit set wherever the count is exactly ``value``, 0 <= value < 2^planes."""
    result = planes[0] if value & 1 else ~planes[0]
    for j in range(1, len(planes)):
        result = result & (planes[j] if value >> j & 1 else ~planes[j])
    return result


def majority(planes: Sequence[Tensor], voters: int) -> tuple[Tensor, Tensor | None]:
    """Where more than half of the voters said yes, and where exactly half did.

    Args:
        planes: the count, from :func:`count_planes`.
        voters: N.

    Returns:
        The majority, and the ties (None for N odd, where there are none); words.
    """
    ahead = reaches(planes, voters // 2 + 1)
    return ahead, None if voters % 2 else equals(planes, voters // 2)


def tally(votes: Sequence[Tensor], rule: str, step: int, sample: range) -> Tally:
    """Count votes and decide.

    Args:
        votes: N >= 1 int32 tensors ``[W]``.
        rule: one of ``RULES``.
        step: its parity is that of alternating ties.
        sample: which words the statistics look at, from the first one on.
    """
    return tally_counts(count_planes(votes), len(votes), rule, step, sample)


def tally_counts(count: list[Tensor], voters: int, rule: str, step: int, sample: range) -> Tally:
    """As :func:`tally`, from the count of so many votes."""
    ahead, tied = majority(count, voters)
    looked = [plane[: sample.stop : sample.step] for plane in count]
    unanimous = popcount(equals(looked, 0) | equals(looked, voters))
    ties = popcount(tied[: sample.stop : sample.step]) if tied is not None else 0
    if rule == "avg":
        planes = count
    elif tied is None:
        planes = [ahead]
    elif rule == "alternate":
        planes = [ahead | (tied & parity_words(len(tied), step, tied.device))]
    else:
        planes = [tied, ahead]
    return Tally(planes, unanimous, ties)


def parity_words(count: int, step: int, device: torch.device) -> Tensor:
    """Bits that alternate by lane and step, int32 ``[count]``: word j is all ones where j + step is odd, else zero."""
    return -((torch.arange(count, dtype=torch.int32, device=device) + step) & 1)


def popcount(words: Tensor) -> Tensor:
    """The number of set bits in all of ``words`` (int32), as an int64 scalar on their device."""
    # The sums of ever wider neighbours inside a word; the arithmetic shift is masked, so the sign does not matter.
    pairs = words - ((words >> 1) & 0x55555555)
    quads = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (quads + (quads >> 4)) & 0x0F0F0F0F
    return octets.view(torch.uint8).sum(dtype=torch.int64)
