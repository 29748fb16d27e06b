"""What all workers must agree on, so that none waits for the votes of one that stopped.

Before the first vote, one small round compares what the ranks optimize (:class:`Opening`). Later, every vote carries
a :class:`Note`. What does not fit together is known to all ranks at once, and all raise the same error.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from ..wire.collectives import Channel

_SHOWN = 4


@dataclass
class Opening:
    """One rank's part of the round before the first vote.

    Attributes:
        layout: digest of the parameter list and of the optimizer's options.
        compiled: 1 if this rank can run the compiled kernels.
        parameters: checksum of the parameters.
        gradients: checksum of the gradients.
    """

    layout: int
    compiled: int
    parameters: int
    gradients: int


@dataclass
class Note:
    """One rank's part of what travels with the votes.

    Attributes:
        settings: digest of the step number and of every group's hyperparameters.
        bad_gradient: index of the first parameter with a NaN or Inf in its gradient; -1 if there is none.
        parameters: checksum of the parameters; 0 where it is not this step's turn to be compared.
    """

    settings: int
    bad_gradient: int
    parameters: int

    def pack(self, device: torch.device) -> Tensor:
        """As int32 ``[6]``."""
        return torch.tensor(astuple(self), dtype=torch.int64, device=device).view(torch.int32)

    @classmethod
    def unpack(cls, notes: Tensor) -> list[Note]:
        """Everyone's, by rank, from int32 ``[N, 6]``."""
        return [cls(*row) for row in notes.contiguous().view(torch.int64).tolist()]


def digest(value: Any) -> int:
    """63 bits of a hash of ``repr(value)``, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little") >> 1


@torch.no_grad()
def checksum(tensors: Sequence[Tensor]) -> int:
    """A number that equal tensors share and others hardly: 0 if all of them are zero or there are none."""
    total = 0
    for index, tensor in enumerate(tensors):
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        bits = tensor.contiguous().view(integers).flatten()
        # Sums at several strides, so that a permutation shows.
        for stride in (1, 3, 7):
            total = (total * 1000003 + (index + 1) * int(bits[::stride].sum(dtype=torch.int64))) % (1 << 62)
    return total


def first_bad_gradient(gradients: Sequence[Tensor | None]) -> int:
    """The index of the first gradient with a NaN or Inf; -1 if there is none. Reads each gradient once."""
    present = [(i, g) for i, g in enumerate(gradients) if g is not None]
    if not present:
        return -1
    # A sum is finite if all its terms are, unless it overflows: then look closer. Backwards, so that what the vote
    # reads first is read last here, and still in the cache.
    sums = torch.stack([g.sum(dtype=torch.float32) for _, g in reversed(present)])
    if bool(sums.isfinite().all()):
        return -1
    return next((i for i, g in present if not bool(g.isfinite().all())), -1)


def exchange_openings(channel: Channel, opening: Opening, device: torch.device) -> list[Opening]:
    """Everyone's opening, by rank. One round of 32 bytes a rank."""
    return [Opening(*row) for row in channel.gather_integers(list(astuple(opening)), device)]


def differing(channel: Channel, description: dict[str, Any]) -> str:
    """Where the ranks' descriptions differ, in words. A collective, for error messages.

    Args:
        channel: the workers.
        description: what is compared: a name for each value, in the order in which to look.
    """
    everyone = channel.gather_objects(description)
    for name in dict.fromkeys(key for one in everyone for key in one):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            ranks.setdefault(str(one.get(name, "absent")), []).append(rank)
        if len(ranks) > 1:
            where = [f"{value} on rank{'s' * (len(of) > 1)} {', '.join(map(str, of))}" for value, of in ranks.items()]
            return f"{name} is {' and '.join(where[:_SHOWN])}{', and so on' * (len(where) > _SHOWN)}"
    return "they differ in a way that their description does not show"
