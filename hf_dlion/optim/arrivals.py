"""When the gradients of a step are complete, and whether they are still as backward has left them."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial

from torch import Tensor

from ..bits.hashing import fingerprint
from .tensors import local

_LATE = (-1, -1, -1)

STEPS_BACK = 3
"""How many steps are looked at: a step with more accumulations than usual is forgotten after as many."""


class Arrivals:
    """When the gradients of a step are complete, as the steps before have shown.

    A gradient is complete after as many accumulations as it had at most in the last few steps: one for each
    micro-batch, or more where a checkpointed model makes several of one.

    Args:
        parameters: those that are trained are watched.
        listener: called in backward with the index of a parameter whose gradient is complete.
    """

    def __init__(self, parameters: Sequence[Tensor], listener: Callable[[int], None]) -> None:
        self.parameters = parameters
        self.watched = frozenset(i for i, parameter in enumerate(parameters) if parameter.requires_grad)
        self._listener = listener
        self._counts = [0] * len(parameters)
        self._expected = [0] * len(parameters)
        self._latest: deque[list[int]] = deque(maxlen=STEPS_BACK)
        self._seen: dict[int, tuple[int, int, int]] = {}
        self._bits: dict[int, tuple[int, int]] = {}
        own = weakref.ref(self)
        self._hooks = [
            parameters[i].register_post_accumulate_grad_hook(partial(_arrived, own, i)) for i in self.watched
        ]

    @property
    def order(self) -> list[int]:
        """The parameters whose gradients are complete, as they became so."""
        return list(self._seen)

    def unchanged(self, indices: Iterable[int]) -> bool:
        """Whether these gradients are what they were when they were complete; or are not there, and were not."""
        return all(self._seen.get(i) == _identity(self.parameters[i].grad) for i in indices)

    def read_shards(self, indices: Iterable[int]) -> None:
        """Find out by their bits which of these gradients that are shards have changed.

        torch does not count what foreach functions, as clipping calls them, change of shards; and the gradients of a
        module share a count, so that it goes up where another one is accumulated.
        """
        for index in self._bits.keys() & set(indices):
            gradient = self.parameters[index].grad
            if self._seen[index] != _LATE:
                self._seen[index] = (self._bits[index] == _bits(gradient) and _identity(gradient)) or _LATE

    def next_step(self) -> None:
        """Learn from this step."""
        self._latest.append(self._counts)
        most = map(max, zip(*self._latest, strict=True))
        self._expected = [now or before for before, now in zip(self._expected, most, strict=True)]
        self._counts = [0] * len(self.parameters)
        self._seen, self._bits = {}, {}

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def arrived(self, index: int) -> None:
        """A gradient was accumulated."""
        self._counts[index] += 1
        if self._counts[index] < self._expected[index]:
            return
        # One too many leaves something that no gradient is equal to: it came after the votes.
        self._seen.pop(index, None)
        late = 0 < self._expected[index] < self._counts[index]
        gradient = self.parameters[index].grad
        self._seen[index] = _LATE if late else _identity(gradient) or _LATE
        if (bits := _bits(gradient)) is not None:
            self._bits[index] = bits
        if self._counts[index] == self._expected[index]:
            self._listener(index)


def _arrived(arrivals: weakref.ref[Arrivals], index: int, parameter: Tensor) -> None:
    watching = arrivals()
    if watching is not None:
        watching.arrived(index)


def _identity(gradient: Tensor | None) -> tuple[int, int, int] | None:
    if gradient is None:
        return None
    held = local(gradient)  # a change in place of a sharded gradient may count for either
    return held.data_ptr(), gradient._version, held._version


def _bits(gradient: Tensor | None) -> tuple[int, int] | None:
    """Of a shard; None for other gradients, and for none."""
    held = None if gradient is None else local(gradient)
    return None if held is None or held is gradient else fingerprint(held)
