"""How the words of the workers become one decision that every worker holds.

The server of the paper (arXiv 2404.00438, Algorithm 1) needs no machine of its own. ``gather``: everyone sends all
words to everyone and counts them all. ``sharded``: rank r is the server of the r-th part of the words.
``hierarchical``: each node has servers of its own, which send each other what they have counted.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from ..bits.counting import Count, Tally, add_counts, count_planes, tally, tally_counts
from ..bits.devices import can_launch
from ..bits.native import NATIVE_FROM, load_count
from .collectives import Channel, ProcessChannel
from .conversation import Conversation
from .nodes import Nodes, split_by_node, workers_per_node

AGGREGATIONS = ("mavo", "avg")
TIES = ("zero", "alternate")
EXCHANGES = ("auto", "gather", "sharded", "hierarchical")

_SAMPLE_WORDS = 1 << 13


@dataclass
class Decision:
    """What the vote decided, as a bit-sliced level of each parameter.

    Attributes:
        planes: P int32 tensors ``[W]``; plane p holds bit p of the level c.
        highest: the highest level n; the decision is D = (2c - n) / n. n = 1 for a majority without ties, 2 for one
            where a tie is zero (level 1), N for an average.
    """

    planes: tuple[Tensor, ...]
    highest: int


@dataclass
class VoteStatistics:
    """How the votes that this rank counted went; the sums over ranks give the whole.

    Steps with abstentions are left out.
    Of a long part only every k-th word is looked at, k odd: about 8,192 words (262,144 parameters) a bucket.

    Attributes:
        device: of the words.
        ties: int64 scalar tensor, votes split evenly, those on padding included where N is even.
        unanimous: int64 scalar tensor, votes on which all agreed.
        counted: votes looked at.
        padding: how many of them, on average, were on padding. Padding has no gradient, so it votes like any zero.
    """

    device: torch.device
    ties: Tensor = field(init=False)
    unanimous: Tensor = field(init=False)
    counted: int = 0
    padding: float = 0.0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.ties = torch.zeros((), dtype=torch.int64, device=self.device)
        self.unanimous = torch.zeros_like(self.ties)
        self.counted, self.padding = 0, 0.0

    def copy(self) -> VoteStatistics:
        """Of what was counted until now."""
        copied = copy(self)
        copied.ties, copied.unanimous = self.ties.clone(), self.unanimous.clone()
        return copied

    def add(self, found: Tally, sample: range, padding_share: float) -> None:
        """Of one part: its sample, and the share of padding in its bucket."""
        self.unanimous += found.unanimous
        self.ties += found.ties
        votes = 32 * len(sample)
        self.counted += votes
        self.padding += votes * padding_share


@dataclass(frozen=True)
class Ballot:
    """What a worker hands in for one bucket.

    Attributes:
        words: int32 ``[W]``, W even, its votes.
        header: int32 ``[H]``, a few numbers that reach every rank with the votes; H may be 0.
        step: its parity is that of alternating ties.
        padding: share of the votes that belong to no parameter, for the statistics.
    """

    words: Tensor
    header: Tensor
    step: int
    padding: float


Voters = Callable[[Tensor], Sequence[int]]
"""Given everyone's header, int32 ``[N, H]``, the ranks whose votes count: the same on every rank."""


class Exchange(ABC):
    """Takes the workers' ballots to one decision; several buckets can be on their way.

    Args:
        channel: the workers.
        aggregation: ``"mavo"`` or ``"avg"``.
        tie: ``"zero"`` or ``"alternate"``; matters to ``"mavo"`` with an even number of workers.
        device: of the words.
        count: how votes are counted; all ways come to the same.
    """

    buckets: int
    """Into how many buckets, if they are not too small for it, a step's words are best cut."""

    def __init__(
        self, channel: Channel, aggregation: str, tie: str, device: torch.device, count: Count = tally
    ) -> None:
        self.channel = channel
        self.aggregation = aggregation
        self.tie = tie
        self.statistics = VoteStatistics(device)
        self._rule = "avg" if aggregation == "avg" else tie
        self._count = count

    @abstractmethod
    def decide(self, ballot: Ballot, voters: Voters) -> Conversation[Decision | None]:
        """Send this worker's ballot, and learn the decision.

        Args:
            ballot: this worker's.
            voters: called once, with the headers, before anything is counted; what it raises ends the conversation.

        Returns:
            The decision of those that count; None where nobody does.
        """

    def _decided(self, votes: Sequence[Tensor], valid: int, ballot: Ballot) -> list[Tensor]:
        """The planes decided from the votes on one part, whose first ``valid`` words are the bucket's."""
        sample = self._sample(len(votes), valid)
        return self._noted(self._count(votes, self._rule, ballot.step, sample), sample, ballot)

    def _decided_by(self, count: list[Tensor], voters: int, valid: int, ballot: Ballot) -> list[Tensor]:
        """As that, from the count of so many votes."""
        sample = self._sample(voters, valid)
        return self._noted(tally_counts(count, voters, self._rule, ballot.step, sample), sample, ballot)

    def _sample(self, voters: int, valid: int) -> range:
        """The words that statistics look at; none, where some abstain."""
        return range(0, max(valid, 0) if voters == self.channel.size else 0, max(valid, 0) // _SAMPLE_WORDS | 1)

    def _noted(self, found: Tally, sample: range, ballot: Ballot) -> list[Tensor]:
        self.statistics.add(found, sample, ballot.padding)
        return found.planes

    def _decision(self, planes: Sequence[Tensor], voters: int) -> Decision:
        return Decision(tuple(planes), highest_level(self.aggregation, self.tie, voters))


class GatherExchange(Exchange):
    """Everyone gets all words and counts them all.

    Round 1, all-gather: (N-1) * 4W bytes sent and received by each rank. No way back.
    """

    buckets = 1

    @staticmethod
    def words_sent(word_count: int, workers: int, planes: int) -> int:
        """How many words a rank sends for a bucket of ``word_count``."""
        return (workers - 1) * word_count

    @override
    def decide(self, ballot: Ballot, voters: Voters) -> Conversation[Decision | None]:
        width = len(ballot.words)
        everyone, work = self.channel.all_gather(_beside(ballot.words, ballot.header))
        yield
        work.wait()
        counted = voters(everyone[:, width:])
        if not counted:
            return None
        votes = [everyone[rank, :width] for rank in counted]
        return self._decision(self._decided(votes, width, ballot), len(votes))


class ShardedExchange(Exchange):
    """Rank r counts the r-th of N equal parts, of C words each, and tells the others.

    Round 1, all-to-all: (N-1) * 4C bytes sent and received by each rank. Round 2, all-gather of the P planes of the
    decision: (N-1) * 4CP bytes. C is W / N, rounded up to an even number. With several buckets, one's way back
    overlaps with the next one's way up.
    """

    buckets = 4

    @staticmethod
    def part_size(word_count: int, workers: int) -> int:
        """C; even, so that a lane's parity is the same in every part."""
        return 2 * -(-word_count // (2 * workers))

    @classmethod
    def words_sent(cls, word_count: int, workers: int, planes: int) -> int:
        """How many words a rank sends for a bucket of ``word_count``."""
        return (workers - 1) * cls.part_size(word_count, workers) * (1 + planes)

    @override
    def decide(self, ballot: Ballot, voters: Voters) -> Conversation[Decision | None]:
        workers, width = self.channel.size, len(ballot.words)
        part = self.part_size(width, workers)
        padded = torch.nn.functional.pad(ballot.words, (0, workers * part - width)).view(workers, part)
        theirs, work = self.channel.all_to_all(_beside(padded, ballot.header.expand(workers, -1)))
        yield
        work.wait()
        counted = voters(theirs[:, part:])
        if not counted:
            return None
        votes = [theirs[rank, :part] for rank in counted]
        valid = min(part, width - self.channel.rank * part)
        decided = torch.stack(self._decided(votes, valid, ballot))
        parts, work = self.channel.all_gather(decided)
        yield
        work.wait()
        planes = parts.transpose(0, 1).reshape(len(decided), -1)
        return self._decision([plane[:width] for plane in planes], len(votes))


class HierarchicalExchange(Exchange):
    """M nodes of L workers: votes are counted inside each node, and the counts travel between nodes.

    Worker p of each node counts its p-th of L equal parts, of C words. Round 1, all-to-all inside the node: (L-1) * 4C
    bytes sent and received by each rank. Round 2, all-gather between the nodes of the counts from 0 to L, of
    ceil(log2(L+1)) planes: (M-1) * 4C bytes a plane. Round 3, all-gather of the P planes of the decision inside the
    node: (L-1) * 4CP bytes. The headers take a small round between the nodes.

    Args:
        channel: all workers, node by node.
        nodes: this worker's place in them.
        aggregation, tie, device: as of :class:`Exchange`.
    """

    buckets = 4

    def __init__(self, channel: Channel, nodes: Nodes, aggregation: str, tie: str, device: torch.device) -> None:
        super().__init__(channel, aggregation, tie, device)
        self.nodes = nodes

    @staticmethod
    def words_between_nodes(word_count: int, workers: int, local: int) -> int:
        """How many words a rank sends to other nodes for a bucket of ``word_count``."""
        return (workers // local - 1) * ShardedExchange.part_size(word_count, local) * local.bit_length()

    @override
    def decide(self, ballot: Ballot, voters: Voters) -> Conversation[Decision | None]:
        inside, across = self.nodes.inside, self.nodes.across
        local, width = inside.size, len(ballot.words)
        part = ShardedExchange.part_size(width, local)
        padded = torch.nn.functional.pad(ballot.words, (0, local * part - width)).view(local, part)
        theirs, work = inside.all_to_all(_beside(padded, ballot.header.expand(local, -1)))
        yield
        work.wait()
        headers = theirs.new_empty((across.size, local, len(ballot.header)))
        if len(ballot.header):
            headers, work = across.all_gather(theirs[:, part:].contiguous())
            yield
            work.wait()
        counted = voters(headers.flatten(0, 1))
        if not counted:
            return None
        here = [rank % local for rank in counted if rank // local == across.rank]
        count = count_planes([theirs[place, :part] for place in here]) if here else []
        count += [theirs.new_zeros(part)] * (local.bit_length() - len(count))
        counts, work = across.all_gather(torch.stack(count))
        yield
        work.wait()
        total = add_counts([one.unbind() for one in counts], len(counted))
        # All nodes count the same; the first one looks at it.
        valid = min(part, width - inside.rank * part) if across.rank == 0 else 0
        decided = torch.stack(self._decided_by(total, len(counted), valid, ballot))
        parts, work = inside.all_gather(decided)
        yield
        work.wait()
        planes = parts.transpose(0, 1).reshape(len(decided), -1)
        return self._decision([plane[:width] for plane in planes], len(counted))


def _beside(words: Tensor, header: Tensor) -> Tensor:
    """Rows of words, each with the header behind it; no copy, where there is none."""
    return torch.cat([words, header], dim=-1) if header.shape[-1] else words


def highest_level(aggregation: str, tie: str, workers: int) -> int:
    """N of :class:`Decision`, if so many workers vote."""
    if aggregation == "avg":
        return workers
    return 2 if workers % 2 == 0 and tie == "zero" else 1


def make_exchange(
    exchange: str, channel: Channel, word_count: int, aggregation: str, tie: str, device: torch.device
) -> Exchange:
    """The exchange of that name; ``"auto"`` is the one that sends fewer bytes, then the one with fewer rounds.

    Where the workers share nodes, and counting inside a node first sends less between them, it is that. A collective
    over the workers, then.

    Args:
        exchange: one of ``EXCHANGES``.
        channel: the workers.
        word_count: W of a whole step.
        aggregation: ``"mavo"`` or ``"avg"``.
        tie: ``"zero"`` or ``"alternate"``.
        device: of the words.

    Raises:
        ValueError: votes are to be counted by node, and there are not several nodes with as many workers each.
    """
    workers = channel.size
    planes = highest_level(aggregation, tie, workers).bit_length()
    sent = {kind: kind.words_sent(word_count, workers, planes) for kind in (GatherExchange, ShardedExchange)}
    kind = min(sent, key=lambda kind: sent[kind])
    if exchange in ("auto", "hierarchical"):
        local = workers_per_node(channel, device) if workers >= 4 else 1
        if exchange == "hierarchical" and local == 1:
            raise ValueError(
                "exchange='hierarchical' with workers that are not on several nodes, as many on each and at least two: "
                "there is nothing to count inside a node first. Take 'auto', or start as many processes on each node."
            )
        # Of what a rank sends, that to other nodes.
        flat = sent[kind] * (workers - local) // (workers - 1)
        less = HierarchicalExchange.words_between_nodes(word_count, workers, local) < flat
        if local > 1 and (exchange == "hierarchical" or less) and isinstance(channel, ProcessChannel):
            return HierarchicalExchange(channel, split_by_node(channel, local), aggregation, tie, device)
    else:
        kind = GatherExchange if exchange == "gather" else ShardedExchange
    return kind(channel, aggregation, tie, device, _fastest_count(device, 32 * word_count) or tally)


def _fastest_count(device: torch.device, votes: int) -> Count | None:
    if can_launch(device):
        from ..bits import gpu

        return gpu.tally
    return load_count() if device.type == "cpu" and votes >= NATIVE_FROM else None
