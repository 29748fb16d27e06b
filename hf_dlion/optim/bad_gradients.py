"""Whether gradients are finite: on a CPU found out at once, on a GPU as a number that stays there."""

from __future__ import annotations

import weakref
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bits.devices import can_launch, send_to
from ..bits.native import NATIVE_FROM, load_find_bad


class KnownFinite:
    """Gradients of the next step that need no look, since they are known to be finite.

    Attributes:
        good: their indices, as far as somebody has looked already.
        hears_of_norms: whether the last step knew the norm of gradients by :meth:`note_norm`.
    """

    def __init__(self) -> None:
        self.good: Container[int] = ()
        self.hears_of_norms = False
        self._normed: tuple[Tensor, list[tuple[weakref.ref[Tensor], int]]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_normed": None}

    def note_norm(self, gradients: Iterable[Tensor], norm: Tensor) -> None:
        """The norm of some gradients is known. If it is finite, the next step reads again only those that have changed.

        Collectives, ``.data`` and numpy change them unseen. Shards, which are subclasses of Tensor, are always read:
        torch does not count all of their changes.

        Args:
            gradients: those.
            norm: of all of them together.
        """
        whole = [gradient for gradient in gradients if type(gradient) is Tensor]
        self._normed = norm.isfinite(), [(weakref.ref(gradient), gradient._version) for gradient in whole]

    def take_doubtful(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Those that are not among them; None in place of the others. What was known is forgotten."""
        good, (normed, finite) = self.good, self._take()
        if finite is None or not bool(finite):
            normed = frozenset()
        return [None if i in good or id(gradient) in normed else gradient for i, gradient in enumerate(gradients)]

    def take_verdict(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """Whether all are finite, if their norm tells that; a GPU is not waited for. What was known is forgotten."""
        normed, finite = self._take()
        return finite if all(gradient is None or id(gradient) in normed for gradient in gradients) else None

    def _take(self) -> tuple[frozenset[int], Tensor | None]:
        """The ids of the gradients that are as they were when their norm was found, and whether it is finite."""
        found, self._normed, self.good = self._normed, None, ()
        finite, gradients = found or (None, [])
        self.hears_of_norms = bool(gradients)
        same = ((ref(), version) for ref, version in gradients)
        return frozenset(id(g) for g, version in same if g is not None and g._version == version), finite


def first_bad_gradient(gradients: Sequence[Tensor | None]) -> int:
    """The index of the first gradient with a NaN or Inf; -1 if there is none. Reads each gradient once."""
    present = [(index, gradient) for index, gradient in enumerate(gradients) if gradient is not None]
    if not present:
        return -1
    device = present[0][1].device
    if device.type != "cpu":
        return int(verdict_on(gradients, device))
    elements = sum(gradient.numel() for _, gradient in present)
    find_bad = load_find_bad() if elements >= NATIVE_FROM else None
    if find_bad is not None:
        first = find_bad([gradient for _, gradient in present])
        return -1 if first == -1 else present[first][0]
    # A sum is finite if all its terms are, unless it overflows: then look closer. Backwards, so that what a vote reads
    # first is read last here, and still in the cache.
    sums = torch.stack([gradient.sum(dtype=torch.float32) for _, gradient in reversed(present)])
    if bool(sums.isfinite().all()):
        return -1
    return next((index for index, gradient in present if not bool(gradient.isfinite().all())), -1)


def verdict_on(gradients: Sequence[Tensor | None], device: torch.device, finite: Tensor | None = None) -> Tensor:
    """As :func:`first_bad_gradient`, int64 ``[1]``; a GPU is not waited for.

    Args:
        gradients: to be judged.
        device: theirs.
        finite: whether the norm of all of them together is, if that is known; kernels do not read them then.
    """
    present = [
        (index, gradient) for index, gradient in enumerate(gradients) if gradient is not None and gradient.numel()
    ]
    if not present:
        return torch.full((1,), -1, dtype=torch.int64, device=device)
    if can_launch(device):
        from ..bits.gpu import first_bad

        return first_bad(gradients, device, finite)
    bad = ~torch.stack(list(torch._foreach_norm([gradient for _, gradient in present], float("inf")))).isfinite()
    none = len(gradients)
    first = torch.where(bad, send_to(device, [index for index, _ in present], torch.int64), none).amin()
    return torch.where(first == none, -1, first).view(1)
