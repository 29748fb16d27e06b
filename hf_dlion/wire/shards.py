"""The ranks that hold one replica together: what they tell each other, so that they are one worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..bits.hashing import digest
from .collectives import ProcessChannel
from .ledger import Ledger

_BITS = 62  # of an int64, that say something


class Shards:
    """One replica, sharded over several ranks; this rank holds shard ``channel.rank`` of ``channel.size``.

    All methods are collectives over the replica.

    Args:
        group: the ranks of the replica.
        replica: its number among the workers.
        ledger: counts what is sent inside the replica; what travels between replicas is in another.
    """

    def __init__(self, group: dist.ProcessGroup, replica: int, ledger: Ledger) -> None:
        self.channel = ProcessChannel(group, ledger)
        self.replica = replica

    @property
    def rank(self) -> int:
        """The number of the shard that this rank holds."""
        return self.channel.rank

    @property
    def size(self) -> int:
        """How many shards there are."""
        return self.channel.size

    def combine(self, values: Sequence[int], device: torch.device, alike: int = 0) -> list[int]:
        """For each value one that stands for those of all shards, the same on all of them; 0 where all are 0.

        Args:
            values: of this rank; as many on all.
            device: where the collective takes its tensors.
            alike: how many, the first ones, must be the same on all shards. Where one is not, what stands for it is
                different in each replica.
        """
        columns = list(zip(*self.channel.gather_integers(list(values), device), strict=True))
        combined = []
        for index, column in enumerate(columns):
            if index < alike:
                same = len(set(column)) == 1
                combined.append(column[0] if same else digest((self.replica, column)))
            else:
                combined.append(digest(column) if any(column) else 0)
        return combined

    def verdict(self, bad: int, present: Sequence[bool], device: torch.device) -> tuple[int, list[bool]]:
        """What is wrong with the gradients of the replica, and which it has.

        Args:
            bad: the index of the first bad gradient of this rank; -1 if there is none.
            present: for each parameter, whether this rank has a gradient.
            device: where the collective takes its tensors.

        Returns:
            The index of the bad gradient that the lowest shard found, or -1; and by parameter whether any rank has one.
        """
        words = [
            sum(one << bit for bit, one in enumerate(present[start : start + _BITS]))
            for start in range(0, len(present), _BITS)
        ]
        rows = self.channel.gather_integers([bad, *words], device)
        found = next((row[0] for row in rows if row[0] >= 0), -1)
        anywhere = [any(row[1 + i // _BITS] >> i % _BITS & 1 for row in rows) for i in range(len(present))]
        return found, anywhere

    def sum(self, values: Tensor) -> Tensor:
        """The sum of a tensor over the shards, in their order: of integers, exact. Does not wait for the device."""
        everyone, work = self.channel.all_gather(values)
        work.wait()
        return everyone.sum(0)

    def describe(self, description: dict[str, Any], alike: bool = False) -> dict[str, Any]:
        """The descriptions of all shards as one, for error messages.

        Args:
            description: of this rank: a name for each value.
            alike: whether the shards should say the same; where they do not, the replica is named, too.
        """
        everyone = self.channel.gather_objects(description)
        where = f" of replica {self.replica}" if alike else ""
        merged: dict[str, Any] = {"the shard": f"{self.rank} of {self.size}"}
        for name in dict.fromkeys(key for one in everyone for key in one):
            values = [one.get(name, "absent") for one in everyone]
            each = ", ".join(f"{value} on shard {shard}" for shard, value in enumerate(values))
            merged[name] = values[0] if len(set(map(str, values))) == 1 else each + where
        return merged
