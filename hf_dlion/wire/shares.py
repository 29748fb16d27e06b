"""How votes went, over all workers."""

from __future__ import annotations

import torch

from .collectives import Channel
from .exchange import Exchange
from .shards import Shards


def shares_of(
    exchange: Exchange, channel: Channel, device: torch.device, shards: Shards | None = None
) -> tuple[float, float]:
    """Of the parameters, the shares on which votes were tied and unanimous, since the last call. A collective.

    Args:
        exchange: that has seen the votes.
        channel: the workers; not one that votes are on.
        device: for what travels.
        shards: of this worker's replica.
    """
    seen = exchange.statistics
    mine = [int(seen.ties), int(seen.unanimous), seen.counted, round(seen.padding)]
    seen.reset()
    rows = channel.gather_integers(mine, device)
    sums = torch.tensor(rows, device=device).sum(0)
    ties, unanimous, counted, padding = (sums if shards is None else shards.sum(sums)).tolist()
    votes = max(counted - padding, 1)
    # Votes on padding are zero votes: ties for N even, split for N odd, and never unanimous.
    return (ties - padding) / votes if channel.size % 2 == 0 else 0.0, unanimous / votes
