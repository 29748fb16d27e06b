"""The device of these tests, and worker processes that share it."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.harness import run_to_their_ends, run_workers

DEVICE = "cuda"

# Asked this way, a process learns of GPUs without starting CUDA, which its forks could not use then.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
# For deterministic products of matrices; read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Of several processes beside each other, each would start as many compilers as there are cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

TIMEOUT = 90.0


def _touch(rank: int) -> float:
    return float(torch.ones(1, device=DEVICE))


@functools.cache
def start_method() -> str:
    """A fork server, if what it forks can have the device: its processes need not import everything anew."""
    [outcome] = run_to_their_ends(_touch, 1, timeout=60)
    return "spawn" if outcome.error else "forkserver"


def run(function: Callable[..., Any], workers: int, *args: Any, timeout: float = TIMEOUT) -> list[Any]:
    """As ``run_workers``, of workers that may all use the one device."""
    return run_workers(function, workers, *args, timeout=timeout, start=start_method())


def there(tensors: Sequence[torch.Tensor | None]) -> list[Any]:
    """Copies on the device."""
    return [None if tensor is None else tensor.to(DEVICE) for tensor in tensors]


def parameters_there(parameters: Sequence[torch.Tensor]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(parameter.detach().to(DEVICE)) for parameter in parameters]


def set_gradients(parameters: Sequence[torch.nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, there(gradients), strict=True):
        parameter.grad = gradient
