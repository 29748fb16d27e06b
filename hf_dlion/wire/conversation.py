"""Work that waits for the network, written in one piece: while one conversation waits, the others go on."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import TypeVar

T = TypeVar("T")

Conversation = Generator[None, None, T]
"""Collectives and what is made of them: yields where it would wait, and returns the outcome."""


def side_by_side(conversations: Iterable[Conversation[None]]) -> None:
    """Run all conversations, each started one turn after the one before it.

    A turn starts the next one, then takes the running ones to their next wait, newest first: all ranks call their
    collectives in the same order.
    """
    running: list[Conversation[None]] = []
    for newest in conversations:
        running = one_turn([newest, *running])
    while running:
        running = one_turn(running)


def run(conversation: Conversation[T]) -> T:
    """The outcome of a conversation that has nothing beside it."""
    while True:
        try:
            next(conversation)
        except StopIteration as end:
            outcome: T = end.value
            return outcome


def one_turn(conversations: Iterable[Conversation[T]]) -> list[Conversation[T]]:
    """Those that wait again after one turn each, which starts those that have not been."""
    ended = object()
    return [one for one in conversations if next(one, ended) is not ended]
