"""Work of two threads on one GPU: each has a stream of its own, and follows what the other has marked.

On other devices all is done when the call that does it returns, and nothing is marked.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

Mark = torch.cuda.Event | None
"""A place in what a stream has been given to do."""


def stream_beside(device: torch.device) -> AbstractContextManager[object]:
    """Puts a thread that enters it on a stream of its own."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else nullcontext()


def mark(device: torch.device) -> Mark:
    """What this thread's stream has been given so far."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


def follow(marked: Mark, *tensors: Tensor) -> None:
    """Let this thread's stream go on after what was marked; the tensors, of another stream, are kept until it has."""
    if marked is None:
        return
    stream = torch.cuda.current_stream(marked.device)
    stream.wait_event(marked)
    for tensor in tensors:
        tensor.record_stream(stream)
