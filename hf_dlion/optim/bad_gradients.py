"""Whether gradients are finite: on a CPU found out at once, on a GPU as a number that stays there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..bits.devices import can_launch, send_to
from ..bits.native import NATIVE_FROM, load_find_bad


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
