"""Which conversation goes on when."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hf_dlion.wire.conversation import Conversation, run, side_by_side


def talk(name: str, waits: int, said: list[str]) -> Conversation[None]:
    for turn in range(waits):
        said.append(f"{name}{turn}")
        yield
    said.append(f"{name}.")


def test_a_turn_starts_the_next_and_takes_the_others_on_newest_first() -> None:
    said: list[str] = []
    side_by_side(talk(name, 2, said) for name in "abc")
    assert said == ["a0", "b0", "a1", "c0", "b1", "a.", "c1", "b.", "c."]


def test_a_conversation_is_begun_only_when_its_turn_comes() -> None:
    said: list[str] = []

    def all_of_them() -> Iterator[Conversation[None]]:
        for name in "ab":
            said.append(f"make {name}")
            yield talk(name, 0, said)

    side_by_side(all_of_them())
    assert said == ["make a", "a.", "make b", "b."]


def test_what_one_raises_ends_all() -> None:
    def fails() -> Conversation[None]:
        yield
        raise ValueError("bad")

    said: list[str] = []
    with pytest.raises(ValueError, match="bad"):
        side_by_side([talk("a", 9, said), fails()])
    assert len(said) < 9


def test_run_returns_the_outcome() -> None:
    def counted() -> Conversation[int]:
        yield
        yield
        return 7

    assert run(counted()) == 7
