"""Replicas that FSDP2 shards over several ranks: what of a parameter a rank holds, and matrices made whole for a while.

``fully_shard`` cuts a parameter along its first dimension as ``torch.chunk`` does: into parts of equal height, the last
ones lower or empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..wire.collectives import Place
from ..wire.groups import Group, rank_in
from ..wire.ledger import Ledger
from ..wire.shards import Shards
from .hidden import Split, matrices_of
from .layout import Bucket, Piece, make_buckets
from .tensors import local, shard_group


def find_shards(parameters: Sequence[Tensor], workers: Group) -> Shards | None:
    """The ranks that hold this replica together; None, if this one holds all of it.

    Args:
        parameters: of the optimizer.
        workers: those that vote: of each replica the rank with the same shard.

    Raises:
        ValueError: the parameters are not sharded alike, or the workers are not of different replicas.
    """
    group = shard_group(parameters)
    if group is None:
        return None
    if isinstance(workers, Place):
        if workers.size > 1:
            raise ValueError(
                "virtual workers, or those of a quorum, with sharded parameters: each of them is a whole model. Do not "
                "shard it."
            )
        return Shards(group, 0, Ledger())
    voting = dist.get_process_group_ranks(workers or dist.group.WORLD)
    together = dist.get_process_group_ranks(group)
    if common := sorted(({*voting} & {*together}) - {dist.get_rank()}):
        raise ValueError(
            f"the process_group of the optimizer has the ranks {voting}, of which this rank and {common} hold shards "
            "of one replica: they have one vote together. Give the optimizer the ranks that hold the same shard of "
            'each replica: process_group=mesh["dp_replicate"].get_group().'
        )
    return Shards(group, rank_in(workers), Ledger())


def shard_rows(rows: int, shards: int) -> list[int]:
    """How many rows of a parameter each shard has."""
    height = -(-rows // shards)
    return [min(max(rows - height * shard, 0), height) for shard in range(shards)]


def shard_sizes(shape: torch.Size, shards: int) -> list[int]:
    """How many elements of a parameter of that shape each shard has."""
    return [rows * shape[1:].numel() for rows in shard_rows(shape[0], shards)]


def largest_share(parameters: Sequence[Tensor], shards: Shards | None) -> int:
    """How many elements the shard with most of them has, which is the first; without shards, how many there are."""
    if shards is None:
        return sum(parameter.numel() for parameter in parameters)
    return sum(shard_sizes(parameter.shape, shards.size)[0] for parameter in parameters)


def lay_out(groups: Sequence[dict[str, Any]], voted: Sequence[bool], shards: Shards | None, count: int) -> list[Bucket]:
    """The layout of what this process holds of the parameters of groups that are voted on, in about so many buckets.

    Elements of shards vote as those of whole replicas do: a vote of zero, and a tie that alternates, follow the parity
    of an element's place in the layout, so its place in that of its shard gets the parity that it has in that of all.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    held = _grouped(groups, voted, [local(parameter) for parameter in parameters])
    if shards is None:
        return make_buckets(held, count)
    whole = make_buckets(_grouped(groups, voted, parameters), 1)
    return make_buckets(held, count, _pieces(whole, [parameter.shape for parameter in parameters], shards))


def _grouped(
    groups: Sequence[dict[str, Any]], voted: Sequence[bool], tensors: Sequence[Tensor]
) -> list[list[tuple[int, Tensor]]]:
    numbered = iter(enumerate(tensors))
    members = [[next(numbered) for _ in group["params"]] for group in groups]
    return [of_group if votes else [] for of_group, votes in zip(members, voted, strict=True)]


def _pieces(whole: Sequence[Bucket], shapes: Sequence[torch.Size], shards: Shards) -> list[list[Piece]]:
    """Of each parameter, what this rank holds, cut where the parities of the whole layout have a break."""
    held = []
    for shape in shapes:
        sizes = shard_sizes(shape, shards.size)
        before = sum(sizes[: shards.rank])
        held.append((before, before + sizes[shards.rank]))
    pieces: list[list[Piece]] = [[] for _ in shapes]
    for segment in (segment for bucket in whole for segment in bucket.segments):
        for span, place in zip(segment.spans, segment.starts, strict=True):
            start, end = held[span.parameter]
            first, last = max(span.start, start), min(span.start + span.length, end)
            if first < last:
                parity = (place + first - span.start) % 2
                _append(pieces[span.parameter], Piece(first - start, last - first, parity))
    return pieces


def _append(pieces: list[Piece], piece: Piece) -> None:
    """Join a piece to the last one, if it goes on where that ends, in parity, too."""
    last = pieces[-1] if pieces else None
    if last is not None and last.parity is not None and (last.parity + last.length) % 2 == piece.parity:
        pieces[-1] = Piece(last.start, last.length + piece.length, last.parity)
    else:
        pieces.append(piece)


def orthogonalize_shards(
    shards: Shards,
    held: Sequence[Tensor],
    shapes: Sequence[torch.Size],
    splits: Sequence[Split],
    orthogonalize: Callable[[Sequence[Tensor], Sequence[Tensor]], None],
) -> list[Tensor]:
    """Orthogonalise at most as many weights as there are shards: rank i gathers the i-th, and gives its shards back.

    A collective over the replica. So each rank has one whole weight at a time, and the work is shared. Two rounds, in
    which a rank sends at most 4 bytes for every element of a shard, and of a weight.

    Args:
        shards: the replica.
        held: float32, flat, what this rank holds of each weight.
        shapes: of the whole weights.
        splits: which matrices are in each.
        orthogonalize: what becomes of whole matrices, and where it is written.

    Returns:
        What this rank holds of each result, flat.
    """
    mine = shards.rank if shards.rank < len(shapes) else None
    nothing = held[0].new_empty(0)
    absent = [nothing] * (shards.size - len(shapes))
    sizes = [0] * shards.size if mine is None else shard_sizes(shapes[mine], shards.size)
    parts = shards.channel.all_to_all_uneven([*held, *absent], sizes)
    results = [nothing] * shards.size
    if mine is not None:
        weight = torch.cat(parts)
        del parts
        matrices = matrices_of(weight.view(shapes[mine]), splits[mine])
        orthogonalize(matrices, matrices)
        results = list(weight.split(sizes))
    lengths = [len(part) for part in held] + [0] * len(absent)
    return shards.channel.all_to_all_uneven(results, lengths)[: len(held)]
