"""The workers of an optimizer: a process group, or the place of one among others, virtual workers say."""

from __future__ import annotations

import torch.distributed as dist

from .collectives import Channel, Place, ProcessChannel
from .ledger import Ledger
from .local import LocalGroup, LocalWorker

Group = dist.ProcessGroup | Place | None
"""None is the default process group; one worker alone, if there is none."""


def group_size(group: Group) -> int:
    """N, the number of workers; 1 without a process group.

    Raises:
        RuntimeError: this rank is not in the group.
    """
    if isinstance(group, Place):
        return group.size
    if group is None and not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise RuntimeError(
            f"rank {dist.get_rank()} is not in the process_group that its optimizer was given, so it cannot vote "
            "there. Give each rank the group that it is a member of."
        )
    return size


def rank_in(group: Group) -> int:
    """The number of this worker, from 0."""
    if isinstance(group, Place):
        return group.rank
    return dist.get_rank(group) if group_size(group) > 1 else 0


def make_channel(group: Group, ledger: Ledger) -> Channel | None:
    """A worker's channel to the others; None for one alone."""
    if group_size(group) == 1:
        return None
    return group.channel(ledger) if isinstance(group, Place) else ProcessChannel(group, ledger)


def alone() -> LocalWorker:
    """The group of a worker that has no others, however many processes there are."""
    return LocalWorker(LocalGroup(1), 0)
