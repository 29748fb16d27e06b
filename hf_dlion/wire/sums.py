"""Dense, ternary and sparse messages of the workers, summed so that every rank has the same, bit for bit.

Sums are taken in the order of the ranks, whatever the collective would do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..bits.counting import count_planes
from ..bits.packing import BLOCK, LANES, pack_bits, unpack_bits
from .collectives import Channel
from .conversation import Conversation


def sum_dense(channel: Channel, values: Tensor, voters: Sequence[int]) -> Conversation[Tensor]:
    """The sum over the voters: an all-reduce.

    Round 1, all-to-all: rank r gets the r-th of N equal parts, of C values, from everyone, and adds them up. Round 2,
    all-gather of the sums. Each sends and receives (N-1) * 4C bytes per round, 2 (N-1)/N * 4 bytes a value.

    Args:
        channel: the workers.
        values: float32 ``[d]``.
        voters: ranks that count, at least one; the others take part in the rounds.

    Returns:
        float32 ``[d]``.
    """
    workers = channel.size
    part = -(-len(values) // workers)
    parts, work = channel.all_to_all(pad(values, (0, workers * part - len(values))).view(workers, part))
    yield
    work.wait()
    first, *others = voters
    total = parts[first].clone()
    for rank in others:
        total += parts[rank]
    sums, work = channel.all_gather(total)
    yield
    work.wait()
    return sums.view(-1)[: len(values)]


def sum_ternary(channel: Channel, values: Tensor, voters: Sequence[int]) -> Conversation[Tensor]:
    """The sum over the voters of values in {-1, 0, 1}.

    A value is two bits, "above 0" and "not below 0": the sum is the number of bits set, less that of voters. Round 1,
    all-to-all of the bits: (N-1)/N * 2 bits a value sent and received. Round 2, all-gather of the bit-sliced counts
    from 0 to 2N: (N-1)/N * ceil(log2(2N+1)) bits.

    Args:
        channel: the workers.
        values: ``[d]``, of any dtype.
        voters: ranks that count, at least one; the others take part in the rounds.

    Returns:
        int32 ``[d]``.
    """
    workers = channel.size
    blocks = -(-len(values) // BLOCK)
    padded = pad(values, (0, blocks * BLOCK - len(values))).view(blocks, LANES, LANES)
    words = torch.empty((2, blocks, LANES), dtype=torch.int32, device=values.device)
    pack_bits(padded > 0, words[0])
    pack_bits(padded >= 0, words[1])
    part = -(-words[0].numel() // workers)
    sent = pad(words.view(2, -1), (0, workers * part - words[0].numel())).view(2, workers, part)
    received, work = channel.all_to_all(sent.transpose(0, 1).contiguous())
    yield
    work.wait()
    planes = torch.stack(count_planes(received[list(voters)].reshape(-1, part).unbind()))
    everyone, work = channel.all_gather(planes)
    yield
    work.wait()
    whole = everyone.transpose(0, 1).reshape(len(planes), -1)[:, : blocks * LANES]
    total = torch.full((blocks * BLOCK,), -len(voters), dtype=torch.int32, device=values.device)
    for weight, plane in enumerate(whole):
        total += unpack_bits(plane.view(blocks, LANES)).view(-1).int() << weight
    return total[: len(values)]


def sum_sparse(
    channel: Channel, indices: Tensor, values: Tensor, size: int, voters: Sequence[int]
) -> Conversation[Tensor]:
    """The sum over the voters of vectors that are zero but for k entries.

    One round, all-gather of 32-bit indices and values: (N-1) * 8k bytes sent and received by each rank.

    Args:
        channel: the workers.
        indices: int32 ``[k]``, each at most once, k the same on every rank.
        values: float32 ``[k]``.
        size: d.
        voters: ranks that count.

    Returns:
        float32 ``[d]``.
    """
    everyone, work = channel.all_gather(torch.stack([indices, values.view(torch.int32)]))
    yield
    work.wait()
    total = torch.zeros(size, dtype=torch.float32, device=values.device)
    for rank in voters:
        theirs, numbers = everyone[rank]
        total.index_add_(0, theirs, numbers.view(torch.float32))
    return total
