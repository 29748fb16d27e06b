"""What the device of a tensor makes possible, and numbers on their way to it."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def can_launch(device: torch.device) -> bool:
    """Whether there is Triton for it, and so :mod:`gpu`."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def send_to(device: torch.device, values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """Numbers as a tensor on a device; a GPU gets them in their turn, without being waited for."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)
