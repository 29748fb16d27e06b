"""What the device of a tensor makes possible, and numbers on their way to it."""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@functools.cache
def can_launch(device: torch.device) -> bool:
    """Whether :mod:`gpu` works there; a warning, where it should and does not."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        from . import gpu

        gpu.try_out(device)
    except Exception as error:  # whatever Triton raises: no C compiler, no folder to write to, a GPU that is too old
        logger.warning(
            "optimizers and votes work in eager mode on %s, which is many times slower: Triton's kernels do not work "
            "there. A C compiler on the path, and a home or TRITON_CACHE_DIR that can be written to, may be what is "
            "missing. The cause: %s",
            device,
            error,
        )
        return False
    return True


def alignment(*numbers: int) -> int:
    """Of addresses in bytes, and lengths and starts in elements: 16 if all are multiples of it, or else 1.

    With 16, a thread of a GPU can read several elements at a time.
    """
    return 1 if any(number % 16 for number in numbers) else 16


def send_to(device: torch.device, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor on a device; a GPU gets them in their turn, without being waited for."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)
