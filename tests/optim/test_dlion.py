"""DistributedLion against the plain reference, over real processes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from hf_dlion import DistributedLion
from hf_dlion.bits.hashing import digest
from hf_dlion.bits.kernels import EAGER
from hf_dlion.bits.packing import LANES
from hf_dlion.optim import layout
from tests.harness import run_workers
from tests.kernels import use_kernels
from tests.reference import ReferenceLion

SETTINGS = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.1}
# Sizes that fill no word, one that fills blocks, and one worked on in place with a rest that is staged.
SHAPES = [(7,), (3, 11), (), (0,), (64, 32), (13, 1601)]
STEPS = 8


def parameters(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def gradients(rank: int, step: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random, coarse enough that directions meet zero, and a third exactly zero."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn = []
    for shape in SHAPES:
        gradient = torch.randn(shape, generator=generator).mul(4).round().div(4)
        drawn.append((gradient * (torch.rand(shape, generator=generator) > 1 / 3)).to(dtype))
    return drawn


@functools.cache
def places() -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Each element's place in its segment, and the span that begins the segment, in the order of the parameters."""
    found = [torch.zeros(torch.Size(shape).numel(), dtype=torch.int64) for shape in SHAPES]
    begins = [[(0, 0)] * len(one) for one in found]
    members = [[(index, parameter) for index, parameter in enumerate(parameters(torch.float32))]]
    for bucket in layout.make_buckets(members, 1):
        for segment in bucket.segments:
            place = 0
            for span in segment.spans:
                part = slice(span.start, span.start + span.length)
                found[span.parameter][part] = torch.arange(place, place + span.length)
                begins[span.parameter][part] = [(segment.spans[0].parameter, segment.spans[0].start)] * span.length
                place += span.length
    return torch.cat(found), [begin for one in begins for begin in one]


def lanes() -> torch.Tensor:
    """Each element's lane in the words."""
    return places()[0] % LANES


def lowbias(values: np.ndarray) -> np.ndarray:
    values = (values ^ (values >> np.uint32(16))) * np.uint32(0x7FEB352D)
    values = (values ^ (values >> np.uint32(15))) * np.uint32(0x846CA68B)
    return values ^ (values >> np.uint32(16))


def rounding(workers: int) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """To bfloat16 with the noise of the place in the segment, or of one worker, in the parameter; by numpy."""
    own, begins = places()
    if workers == 1:
        own = torch.cat([torch.arange(torch.Size(shape).numel()) for shape in SHAPES])
        begins = [(index, 0) for index, shape in enumerate(SHAPES) for _ in range(torch.Size(shape).numel())]

    digests = {begin: digest(begin) & 0x7FFFFFFF for begin in set(begins)}
    begun = np.array([digests[begin] for begin in begins], dtype=np.uint32)

    def rounded(updated: torch.Tensor, step: int) -> torch.Tensor:
        seeds = lowbias(begun ^ np.uint32(step))
        noise = lowbias(own.numpy().astype(np.uint32) ^ (seeds & np.uint32(0x7FFFFFFF))) & np.uint32(0xFFFF)
        upper = (updated.numpy().view(np.uint32) + noise) & np.uint32(0xFFFF0000)
        return torch.from_numpy(upper.view(np.float32)).to(torch.bfloat16)

    return rounded


def flatten(tensors: list[Any]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def same_on_all_ranks(tensor: torch.Tensor, workers: int) -> bool:
    everyone = [torch.empty_like(tensor) for _ in range(workers)]
    dist.all_gather(everyone, tensor)
    return all(torch.equal(other, tensor) for other in everyone)


def follow_reference(rank: int, workers: int, cases: list[tuple[str, str, str, torch.dtype]], kernels: str) -> None:
    use_kernels(kernels)
    for aggregation, tie, exchange, dtype in cases:
        case = f"{aggregation} {tie} {exchange} {dtype}"
        mine = parameters(dtype)
        optimizer = DistributedLion(mine, aggregation=aggregation, tie=tie, exchange=exchange, **SETTINGS)
        reference = ReferenceLion(
            flatten(mine).clone(), workers, **SETTINGS, aggregation=aggregation, tie=tie, lanes=lanes()
        )
        if dtype == torch.bfloat16:
            reference.rounding = rounding(workers)
        for step in range(STEPS):
            for parameter, gradient in zip(mine, gradients(rank, step, dtype), strict=True):
                parameter.grad = gradient
            optimizer.step()
            reference.step([flatten(gradients(other, step, dtype)) for other in range(workers)])
            assert same_on_all_ranks(flatten(mine), workers), f"{case}: ranks differ after step {step}"
            assert torch.equal(flatten(mine), reference.parameters), f"{case}: not the reference after step {step}"
            momenta = flatten([optimizer.state[parameter]["momentum"] for parameter in mine])
            assert torch.equal(momenta, reference.momenta[rank]), f"{case}: momentum after step {step}"


DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("kernels", ["eager", "native"])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5])
def test_equals_the_reference(workers: int, kernels: str) -> None:
    cases = list(itertools.product(("mavo", "avg"), ("zero", "alternate"), ("gather", "sharded"), DTYPES))
    run_workers(follow_reference, workers, workers, cases, kernels)


def a_step_where_some_compile(rank: int, compiling: int) -> bool:
    use_kernels("native" if rank < compiling else "eager")
    params = parameters(torch.float32)
    optimizer = DistributedLion(params)
    for parameter in params:
        parameter.grad = torch.full_like(parameter, rank + 1)
    optimizer.step()
    assert optimizer.plan is not None
    return optimizer.plan.views.kernels is EAGER


def test_compiled_kernels_are_used_where_all_ranks_have_them() -> None:
    assert run_workers(a_step_where_some_compile, 2, 1) == [True, True]
    assert run_workers(a_step_where_some_compile, 2, 2) == [False, False]
