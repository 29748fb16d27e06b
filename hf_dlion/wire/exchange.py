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

from .collectives import Channel, Pending
from .counting import count_planes, equals, majority, parity_words, popcount

AGGREGATIONS = ("mavo", "avg")
TIES = ("zero", "alternate")
EXCHANGES = ("auto", "gather", "sharded")

Sent = tuple[Tensor, Pending]

_SAMPLE_WORDS = 1 << 13


@dataclass
class Decision:
    """What the vote decided, as a bit-sliced level of each parameter.

    Attributes:
        planes: P int32 tensors ``[W]``; plane p holds bit p of the level c.
        top: the highest level n; the decision is D = (2c - n) / n. n = 1 for a majority without ties, 2 for one
            where a tie is zero (level 1), N for an average.
    """

    planes: tuple[Tensor, ...]
    top: int


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


class Exchange(ABC):
    """Sends words and returns the decision; several buckets can be on their way.

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
    def send(self, words: Tensor, note: Tensor) -> Sent:
        """Start sending this worker's votes; pass what comes back to :meth:`receive`.

        Args:
            words: int32 ``[W]``, W even.
            note: int32 ``[H]``, a few words that reach every rank with the votes.
        """

    @abstractmethod
    def receive(self, sent: Sent, words: int) -> tuple[Tensor, Tensor]:
        """Wait for the votes that this rank counts, int32 ``[N, C]``, and everyone's note, ``[N, H]``."""

    @abstractmethod
    def decide(self, votes: Tensor, words: int, step: int, padding_share: float) -> Callable[[], Decision]:
        """Count the votes and start to tell the others; call what comes back for the whole decision.

        Args:
            votes: from :meth:`receive`, those that count: the same rows on every rank.
            words: W.
            step: its parity is that of alternating ties.
            padding_share: how much of the bucket is padding, for the statistics.
        """

    def _decide(self, votes: Sequence[Tensor], valid: int, step: int, padding_share: float) -> list[Tensor]:
        """The planes decided from the votes on one part, whose first ``valid`` words are the bucket's."""
        count = count_planes(votes)
        ahead, tied = majority(count, len(votes))
        if valid > 0 and len(votes) == self.channel.size:
            self.statistics.observe(
                [plane[:valid] for plane in count], None if tied is None else tied[:valid], len(votes), padding_share
            )
        if self.aggregation == "avg":
            return count
        if tied is None:
            return [ahead]
        if self.tie == "alternate":
            return [ahead | (tied & parity_words(len(tied), step, tied.device))]
        return [tied, ahead]  # levels: 0 for -1, 1 for a tie, 2 for +1

    def _top(self, votes: Tensor) -> int:
        return top_level(self.aggregation, self.tie, len(votes))


class GatherExchange(Exchange):
    """Everyone gets all words and counts them all.

    Round 1, all-gather: (N-1) * 4W bytes sent and received by each rank. No way back.
    """

    buckets = 1

    @staticmethod
    def sent_words(words: int, workers: int, planes: int) -> int:
        """Words that a rank sends for a bucket of ``words``."""
        return (workers - 1) * words

    @override
    def send(self, words: Tensor, note: Tensor) -> Sent:
        return self.channel.all_gather(torch.cat([words, note]))

    @override
    def receive(self, sent: Sent, words: int) -> tuple[Tensor, Tensor]:
        parts, work = sent
        work.wait()
        return parts[:, :words], parts[:, words:]

    @override
    def decide(self, votes: Tensor, words: int, step: int, padding_share: float) -> Callable[[], Decision]:
        decision = Decision(tuple(self._decide(votes.unbind(), words, step, padding_share)), self._top(votes))
        return lambda: decision


class ShardedExchange(Exchange):
    """Rank r counts the r-th of N equal parts, of C words each, and tells the others.

    Round 1, all-to-all: (N-1) * 4C bytes sent and received by each rank. Round 2, all-gather of the P planes of the
    decision: (N-1) * 4CP bytes. C is W / N, rounded up to an even number. With several buckets, one's way back
    overlaps with the next one's way up.
    """

    buckets = 4

    @staticmethod
    def part_words(words: int, workers: int) -> int:
        """C; even, so that a lane's parity is the same in every part."""
        return 2 * -(-words // (2 * workers))

    @classmethod
    def sent_words(cls, words: int, workers: int, planes: int) -> int:
        """Words that a rank sends for a bucket of ``words``."""
        return (workers - 1) * cls.part_words(words, workers) * (1 + planes)

    @override
    def send(self, words: Tensor, note: Tensor) -> Sent:
        workers = self.channel.size
        part = self.part_words(len(words), workers)
        padded = torch.nn.functional.pad(words, (0, workers * part - len(words)))
        return self.channel.all_to_all(torch.cat([padded.view(workers, part), note.expand(workers, -1)], dim=1))

    @override
    def receive(self, sent: Sent, words: int) -> tuple[Tensor, Tensor]:
        parts, work = sent
        work.wait()
        part = self.part_words(words, self.channel.size)
        return parts[:, :part], parts[:, part:]

    @override
    def decide(self, votes: Tensor, words: int, step: int, padding_share: float) -> Callable[[], Decision]:
        part = votes.shape[1]
        valid = min(part, words - self.channel.rank * part)
        decided = torch.stack(self._decide(votes.unbind(), valid, step, padding_share))
        parts, work = self.channel.all_gather(decided)

        def whole() -> Decision:
            work.wait()
            planes = parts.transpose(0, 1).reshape(len(decided), -1)
            return Decision(tuple(plane[:words] for plane in planes), self._top(votes))

        return whole


def top_level(aggregation: str, tie: str, workers: int) -> int:
    """N of :class:`Decision`."""
    if aggregation == "avg":
        return workers
    return 2 if workers % 2 == 0 and tie == "zero" else 1


def make_exchange(
    exchange: str, channel: Channel, words: int, aggregation: str, tie: str, device: torch.device
) -> Exchange:
    """The exchange of that name; ``"auto"`` is the one that sends fewer bytes, then the one with fewer rounds.

    Args:
        exchange: one of ``EXCHANGES``.
        channel: the workers.
        words: W of a whole step.
        aggregation: ``"mavo"`` or ``"avg"``.
        tie: ``"zero"`` or ``"alternate"``.
        device: of the words.
    """
    if exchange == "auto":
        planes = top_level(aggregation, tie, channel.size).bit_length()
        gathered = GatherExchange.sent_words(words, channel.size, planes)
        exchange = "gather" if gathered <= ShardedExchange.sent_words(words, channel.size, planes) else "sharded"
    kind = GatherExchange if exchange == "gather" else ShardedExchange
    return kind(channel, aggregation, tie, device)
