"""How votes went, over all workers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .collectives import Channel
from .exchange import Exchange
from .shards import Shards

_FRACTION = 1 << 10  # of a rank's mean number of votes on padding, which the ranks add up


@dataclass(frozen=True)
class VoteShares:
    """How the votes went since they were last asked for, over all workers.

    Attributes:
        ties: share of the parameters on which the votes were split evenly; 0 for N odd.
        unanimous: share of the parameters on which all workers agreed.
    """

    ties: float
    unanimous: float


def shares_of(exchange: Exchange, channel: Channel, shards: Shards | None = None) -> VoteShares | None:
    """How the votes on an exchange went since the last call. A collective over the workers; None without votes.

    Args:
        exchange: that has seen the votes.
        channel: the workers; not one that votes are on.
        shards: of this worker's replica.
    """
    seen = exchange.statistics
    mine = [int(seen.ties), int(seen.unanimous), seen.counted, round(seen.padding * _FRACTION)]
    seen.reset()
    sums = torch.tensor(channel.gather_integers(mine, seen.device), device=seen.device).sum(0)
    ties, unanimous, counted, padding = (sums if shards is None else shards.sum(sums)).tolist()
    if not counted:
        return None
    padding /= _FRACTION
    votes = max(counted - padding, 1)
    # Votes on padding are zero votes: ties for N even, split for N odd, and never unanimous.
    return VoteShares((ties - padding) / votes if channel.size % 2 == 0 else 0.0, unanimous / votes)
