"""Which workers share a machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .collectives import Channel, ProcessChannel
from .ledger import Ledger


@dataclass(frozen=True)
class Nodes:
    """A worker's place among M nodes of L workers each, numbered node by node.

    Attributes:
        inside: the workers of this node.
        across: those with this place in each of the nodes.
    """

    inside: Channel
    across: Channel


def workers_per_node(channel: Channel, device: torch.device) -> int:
    """L, by what ``torchrun`` and ``accelerate launch`` tell each process. A small collective over the workers.

    They number processes node by node, so that the processes of a node are those with the same first rank. Of sharded
    replicas, other processes of the node may be no workers of this channel.

    Returns:
        1, where the nodes have different numbers of workers, the workers are not numbered node by node, or all share
        one node.
    """
    if not isinstance(channel, ProcessChannel):
        return 1
    own = dist.get_rank() - int(os.environ.get("LOCAL_RANK", 0))
    firsts = [row[0] for row in ProcessChannel(channel.group, Ledger()).gather_integers([own], device)]
    nodes = list(dict.fromkeys(firsts))
    size = channel.size // len(nodes)
    return size if len(nodes) > 1 and firsts == [first for first in nodes for _ in range(size)] else 1


def split_by_node(channel: ProcessChannel, size: int) -> Nodes:
    """The channels of this worker inside its node of so many workers, and across nodes; they share a ledger."""
    channel.align_groups()
    node, place = divmod(channel.rank, size)
    inside = channel.beside(range(node * size, (node + 1) * size))
    return Nodes(inside, channel.beside(range(place, channel.size, size)))
