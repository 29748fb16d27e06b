"""Triton's passes beside the eager ones, in Triton's interpreter; a process of its own, which no import came before.

TRITON_INTERPRET=1 python -m tests.optim.launched METHOD WORKERS
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from hf_dlion import DistributedLion, DistributedMuon
from hf_dlion.bits import counting, gpu
from hf_dlion.optim.virtual import VirtualWorkers
from tests.kernels import use_kernels

METHODS = {"dlion": DistributedLion, "dmuon": DistributedMuon}
# Sizes that fill no word, a block and its rest, one that is worked on in place with a rest, and a split matrix.
SHAPES = [(7,), (3, 11), (), (0,), (9, 120), (13, 1301)]
CASES = [
    (torch.float32, "mavo", "alternate"),
    (torch.bfloat16, "mavo", "zero"),
    (torch.float32, "avg", "zero"),
    (torch.float16, "avg", "zero"),
]
STEPS = 3


def groups(method: str, parameters: list[torch.nn.Parameter]) -> list[Any]:
    if method == "dlion":
        return parameters
    hidden = [{"params": parameters[4:5], "orthogonal": True, "split": (1, 60, 60)}]
    hidden += [{"params": parameters[5:], "orthogonal": True}]
    return [*hidden, {"params": parameters[:4], "orthogonal": False, "weight_decay": 0.0}]


def gradients(rank: int, step: int, dtype: torch.dtype) -> list[Tensor | None]:
    """A third zeros; of one parameter none on some ranks and none at all at times, and once a bad one."""
    source = torch.Generator().manual_seed(1000 * step + rank)
    drawn: list[Tensor | None] = []
    for shape in SHAPES:
        gradient = torch.randn(shape, generator=source).mul(4).round().div(4)
        drawn.append((gradient * (torch.rand(shape, generator=source) > 1 / 3)).to(dtype))
    if rank == 0 or step == 1:
        drawn[1] = drawn[4] = None
    if rank == 1 and step == 2:
        drawn[0] = torch.full((7,), torch.inf, dtype=dtype)
    return drawn


def train(kernels: str, method: str, workers: int, dtype: torch.dtype, aggregation: str, tie: str) -> list[Tensor]:
    use_kernels(kernels)
    source = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in SHAPES]
    options: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "aggregation": aggregation, "tie": tie}
    made: Any = groups(method, parameters)
    kind = METHODS[method]
    optimizer: Any = kind(made, **options) if workers == 1 else VirtualWorkers(made, workers, kind, **options)
    for step in range(STEPS):
        for rank in range(workers):
            for parameter, gradient in zip(parameters, gradients(rank, step, dtype), strict=True):
                parameter.grad = gradient
            if workers > 1:
                optimizer.next_worker()
        optimizer.step()
    states = [state["momentum"] for member in optimizer.members for state in member.state.values()]
    assert optimizer.members[0].plan.views.__class__.__name__.startswith(kernels.capitalize()) == (
        kernels == "launched"
    )
    return [*(parameter.detach() for parameter in parameters), *states]


def check_counts() -> None:
    source = torch.Generator().manual_seed(0)
    for voters, (words, sample) in itertools.product(
        (1, 2, 3, 4, 5, 9), ((1, range(0)), (130, range(0, 120, 3)), (300, range(300)))
    ):
        cast = list(torch.randint(-(2**31), 2**31, (voters, words), dtype=torch.int32, generator=source))
        for vote in cast:
            vote[::5] = cast[0][::5]  # some are unanimous
        for rule, step in itertools.product(counting.RULES, (6, 7)):
            ours, eager = gpu.tally(cast, rule, step, sample), counting.tally(cast, rule, step, sample)
            assert all(itertools.starmap(torch.equal, zip(ours.planes, eager.planes, strict=True)))
            assert (int(ours.unanimous), int(ours.ties)) == (int(eager.unanimous), int(eager.ties))


if __name__ == "__main__":
    if sys.argv[1] == "counts":
        check_counts()
    else:
        method, workers = sys.argv[1], int(sys.argv[2])
        for case in CASES:
            ours, eager = (train(kernels, method, workers, *case) for kernels in ("launched", "eager"))
            assert all(itertools.starmap(torch.equal, zip(ours, eager, strict=True))), case
