"""What methods share whose workers send the largest entries and keep the rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..wire.collectives import Channel
from ..wire.sums import sum_sparse

RESIDUAL = "residual"
MOST_ENTRIES = 2**31


def largest(values: Tensor, share: float) -> Tensor:
    """Indices of the entries of largest magnitude: that share of them, at least one, of a flat tensor."""
    count = min(len(values), max(1, round(share * len(values))))
    return values.abs().topk(count, sorted=False).indices


def sum_chosen(
    channel: Channel | None, voters: Sequence[int], indices: list[Tensor], values: list[Tensor], size: int
) -> Tensor:
    """The sum over the voters of their chosen entries, float32 ``[size]``.

    Raises:
        ValueError: there are more entries than an index of 32 bits can name.
    """
    if size > MOST_ENTRIES:
        raise ValueError(
            f"{size} parameters: entries travel with an index of 32 bits, for up to {MOST_ENTRIES}. Train fewer, by "
            "LoRA for example, or by a method that sends no indices."
        )
    chosen, entries = torch.cat(indices), torch.cat(values)
    if channel is None:
        return torch.zeros(size, dtype=torch.float32, device=entries.device).index_add_(0, chosen, entries)
    return sum_sparse(channel, chosen.int(), entries, size, voters)
