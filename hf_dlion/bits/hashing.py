"""Hashes that are the same on every machine: of values by their ``repr``, of tensors by their bits."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PIECE = 1 << 20
"""Elements that are summed at once on a CPU, which widens them first, to 8 bytes each."""


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
        size = _PIECE if bits.device.type == "cpu" else max(len(bits), 1)
        pieces = bits.split(size)
        # Sums at several strides, so that a permutation shows.
        for stride in (1, 3, 7):
            of_stride = torch.zeros((), dtype=torch.int64, device=tensor.device)
            for at, piece in enumerate(pieces):
                of_stride += piece[-at * size % stride :: stride].sum(dtype=torch.int64)
            total = (total * 1000003 + (index + 1) * int(of_stride)) % (1 << 62)
    return total


@torch.no_grad()
def fingerprint(tensor: Tensor) -> tuple[int, int]:
    """Two numbers that a tensor hardly has any more when it was scaled, clipped or negated in place.

    Of a large one, they take a sixth of the time of :func:`checksum`: sums of its bits and of its values.

    Args:
        tensor: of 2 or 4 bytes an element.
    """
    flat = tensor.detach().reshape(-1).contiguous()  # one dimension can have gaps
    of_eight = 8 // tensor.element_size()
    start = min(-flat.storage_offset() % of_eight, len(flat))  # int64 begins at multiples of 8 bytes
    end = start + (len(flat) - start) // of_eight * of_eight
    integers = torch.int16 if of_eight == 4 else torch.int32
    ends = torch.cat([flat[:start], flat[end:]]).view(integers)
    bits = int(ends.sum()) + (int(flat[start:end].view(torch.int64).sum()) if start < end else 0)
    return bits, int(flat.sum(dtype=torch.float32).view(torch.int32))


def scatter(elements: Tensor, seed: Tensor | int) -> Tensor:
    """A hash of each number: int32, of which each bit is as good as random.

    Args:
        elements: int32.
        seed: below 2^31; a tensor is int32 ``[1]``.
    """
    # Two rounds of xor, shift and multiply ("lowbias32"), in int32 that wraps; >> is arithmetic, so masked.
    h = elements ^ seed
    h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    h.bitwise_xor_((h >> 15).bitwise_and_(0x1FFFF)).mul_(-0x7B935975)
    return h.bitwise_xor_((h >> 16).bitwise_and_(0xFFFF))


def scatter_number(element: int, seed: int) -> int:
    """As :func:`scatter`, of one number; its 32 bits without a sign."""
    h = (element ^ seed) & 0xFFFFFFFF
    h = (h ^ h >> 16) * 0x7FEB352D & 0xFFFFFFFF
    h = (h ^ h >> 15) * -0x7B935975 & 0xFFFFFFFF
    return h ^ h >> 16
