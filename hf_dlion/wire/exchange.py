"""How the words of the workers become one decision that every worker holds.

The server of the paper (arXiv 2404.00438, Algorithm 1) needs no machine of its own. ``gather``: everyone sends all
words to everyone and counts them all. ``sharded``: rank r is the server of the r-th part of the words.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from typing_extensions import override

from ..bits.counting import count_planes, equals, majority, parity_words, popcount
from .collectives import Channel
from .conversation import Conversation

AGGREGATIONS = ("mavo", "avg")
TIES = ("zero", "alternate")
EXCHANGES = ("auto", "gather", "sharded")

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

    def observe(self, count: Sequence[Tensor], tied: Tensor | None, voters: int, padding_share: float) -> None:
        """Look at one part: its count, its ties (None for N odd), and the share of padding in its bucket."""
        stride = len(count[0]) // _SAMPLE_WORDS | 1
        sample = [plane[::stride] for plane in count]
        self.unanimous += popcount(equals(sample, 0) | equals(sample, voters))
        if tied is not None:
            self.ties += popcount(tied[::stride])
        votes = 32 * len(sample[0])
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
    """

    buckets: int
    """Into how many buckets, if they are not too small for it, a step's words are best cut."""

    def __init__(self, channel: Channel, aggregation: str, tie: str, device: torch.device) -> None:
        self.channel = channel
        self.aggregation = aggregation
        self.tie = tie
        self.statistics = VoteStatistics(device)

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
        count = count_planes(votes)
        ahead, tied = majority(count, len(votes))
        if valid > 0 and len(votes) == self.channel.size:
            self.statistics.observe(
                [plane[:valid] for plane in count], None if tied is None else tied[:valid], len(votes), ballot.padding
            )
        if self.aggregation == "avg":
            return count
        if tied is None:
            return [ahead]
        if self.tie == "alternate":
            return [ahead | (tied & parity_words(len(tied), ballot.step, tied.device))]
        return [tied, ahead]  # levels: 0 for -1, 1 for a tie, 2 for +1

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
        everyone, work = self.channel.all_gather(torch.cat([ballot.words, ballot.header]))
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
        theirs, work = self.channel.all_to_all(torch.cat([padded, ballot.header.expand(workers, -1)], dim=1))
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


def highest_level(aggregation: str, tie: str, workers: int) -> int:
    """N of :class:`Decision`, if so many workers vote."""
    if aggregation == "avg":
        return workers
    return 2 if workers % 2 == 0 and tie == "zero" else 1


def make_exchange(
    exchange: str, channel: Channel, word_count: int, aggregation: str, tie: str, device: torch.device
) -> Exchange:
    """The exchange of that name; ``"auto"`` is the one that sends fewer bytes, then the one with fewer rounds.

    Args:
        exchange: one of ``EXCHANGES``.
        channel: the workers.
        word_count: W of a whole step.
        aggregation: ``"mavo"`` or ``"avg"``.
        tie: ``"zero"`` or ``"alternate"``.
        device: of the words.
    """
    if exchange == "auto":
        planes = highest_level(aggregation, tie, channel.size).bit_length()
        gathered = GatherExchange.words_sent(word_count, channel.size, planes)
        exchange = "gather" if gathered <= ShardedExchange.words_sent(word_count, channel.size, planes) else "sharded"
    kind = GatherExchange if exchange == "gather" else ShardedExchange
    return kind(channel, aggregation, tie, device)
