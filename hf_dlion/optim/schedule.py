"""When which parameters vote, with local steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """The parameters in parts that vote in turn, each every so many steps; a vote has its effect some steps later.

    Attributes:
        every: H, steps from one vote of a part to its next.
        fragments: how many parts; each is whole parameters.
        delay: steps from sending a vote to its effect, so few that one vote at a time is on its way.

    Raises:
        ValueError: an attribute out of its range.
    """

    every: int
    fragments: int
    delay: int

    def __post_init__(self) -> None:
        every, fragments, delay = self.every, self.fragments, self.delay
        if type(every) is not int or every < 1:
            raise ValueError(f"every={every!r}: it is a number of steps, at least 1.")
        if type(fragments) is not int or not 1 <= fragments <= every:
            raise ValueError(f"fragments={fragments!r}: it is a number from 1 to every, {every}.")
        if type(delay) is not int or not 0 <= delay <= every // fragments:
            raise ValueError(
                f"delay={delay!r}: it is a number of steps from 0 to every // fragments, {every // fragments}, so that "
                "one vote at a time is on its way."
            )

    def part(self, made: int, sizes: Sequence[int]) -> list[int]:
        """The indices of the parameters that vote after so many steps, by the sizes of all; about as much a part."""
        turns = [(1 + fragment) * self.every // self.fragments % self.every for fragment in range(self.fragments)]
        if made % self.every not in turns:
            return []
        chosen, place, total = turns.index(made % self.every), 0, max(sum(sizes), 1)
        part: list[int] = []
        for index, size in enumerate(sizes):
            middle = place + size / 2
            place += size
            if min(int(middle * self.fragments / total), self.fragments - 1) == chosen:
                part.append(index)
        return part

    def flight(self, made: int, since: int, sizes: Sequence[int]) -> tuple[int, list[int]] | None:
        """After how many steps the vote was sent that is on its way, and of which parameters; None if there is none.

        Args:
            made: steps so far.
            since: of these, those since the last vote that was on all parameters.
            sizes: of all parameters.
        """
        for age in range(min(self.delay, since)):
            if part := self.part(made - age, sizes):
                return made - age, part
        return None

    def number(self, made: int) -> int:
        """That of a part's vote after so many steps, from 1."""
        return -(-made // self.every)

    def whole_rounds(self, steps: int) -> int:
        """The least multiple of ``every`` that is at least ``steps``, if that is a number of steps."""
        return self.every * self.number(steps) if steps > 0 else steps
