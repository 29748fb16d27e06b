"""What methods share whose workers send the largest entries and keep the rest."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..wire.collectives import Channel
from ..wire.conversation import Conversation
from ..wire.sums import sum_sparse

RESIDUAL = "residual"
MOST_ENTRIES = 2**31


def largest(values: Tensor, share: float) -> Tensor:
    """Indices of the entries of largest magnitude: that share of them, at least one, of a flat tensor."""
    count = min(len(values), max(1, round(share * len(values))))
    return values.abs().topk(count, sorted=False).indices


def sum_largest(
    channel: Channel | None, voters: Sequence[int], residuals: Sequence[Tensor], share: float
) -> Conversation[tuple[Tensor, list[Tensor]]]:
    """Send that share of the residuals, their largest entries, which become zero.

    Args:
        channel: the workers; None for one alone.
        voters: the ranks that count.
        residuals: float32, flat, one a parameter; changed.
        share: of the entries of each.

    Returns:
        The sum over the voters, float32, all parameters one after the other; and of each parameter the indices sent.

    Raises:
        ValueError: there are more entries than an index of 32 bits can name.
    """
    size = sum(map(len, residuals))
    if size > MOST_ENTRIES:
        raise ValueError(
            f"{size} parameters: entries travel with an index of 32 bits, for up to {MOST_ENTRIES}. Train fewer, by "
            "LoRA for example, or by a method that sends no indices."
        )
    chosen = [largest(residual, share) for residual in residuals]
    offsets = itertools.accumulate(map(len, residuals), initial=0)
    indices = torch.cat([one + offset for one, offset in zip(chosen, offsets, strict=False)])
    entries = torch.cat([residual[one] for residual, one in zip(residuals, chosen, strict=True)])
    for residual, one in zip(residuals, chosen, strict=True):
        residual[one] = 0
    if channel is None:
        return torch.zeros(size, dtype=torch.float32, device=entries.device).index_add_(0, indices, entries), chosen
    return (yield from sum_sparse(channel, indices.int(), entries, size, voters)), chosen
