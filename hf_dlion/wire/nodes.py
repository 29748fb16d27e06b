"""Which workers share a machine."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

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
    """L, as ``torchrun`` and ``accelerate launch`` tell each process. A small collective over the workers.

    Returns:
        1, where the nodes have different numbers of workers, the workers are not numbered node by node, or all share
        one node.
    """
    if not isinstance(channel, ProcessChannel):
        return 1
    own = [int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))]
    everyone = ProcessChannel(channel.group, Ledger()).gather_integers(own, device)
    sizes = {size for size, _ in everyone}
    [size] = sizes if len(sizes) == 1 else [1]
    if size < 1 or channel.size % size or any(place != rank % size for rank, (_, place) in enumerate(everyone)):
        return 1
    return size if size < channel.size else 1


def split_by_node(channel: ProcessChannel, size: int) -> Nodes:
    """The channels of this worker inside its node of so many workers, and across nodes; they share a ledger."""
    node, place = divmod(channel.rank, size)
    inside = channel.beside(range(node * size, (node + 1) * size))
    return Nodes(inside, channel.beside(range(place, channel.size, size)))
