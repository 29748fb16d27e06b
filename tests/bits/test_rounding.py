"""bfloat16 parameters: rounded at random, so that small updates are not lost."""

from __future__ import annotations

import pytest
import torch

from hf_dlion import DistributedLion
from hf_dlion.bits.rounding import round_at_random, rounding_seed
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.methods import METHODS

COUNT = 1 << 16


def rounded(values: torch.Tensor, step: int) -> torch.Tensor:
    places = torch.arange(len(values), dtype=torch.int32)
    return round_at_random(values, places, rounding_seed(step, 0, 0, values.device)).float()


@pytest.mark.parametrize("value", [1.001, -3.3e-5, 1e-40, 1e30])
def test_to_a_neighbour_without_bias(value: float) -> None:
    values = torch.full((COUNT,), value)
    found = rounded(values, 0)
    low = values[0].view(torch.int32) & -0x10000
    neighbours = torch.stack([low, low + 0x10000]).view(torch.float32)
    assert sorted(found.unique()) == sorted(neighbours)
    gap = float(neighbours[1] - neighbours[0])
    # The mean of so many draws of a coin is within five standard deviations of it.
    assert abs(float((found.double() - values.double()).mean()) / gap) < 5 * 0.5 / COUNT**0.5
    assert not torch.equal(rounded(values, 1), found)


def test_what_bfloat16_holds_stays() -> None:
    values = torch.randn(COUNT).to(torch.bfloat16).float()
    assert torch.equal(rounded(values, 0), values)


@pytest.mark.parametrize("name", [name for name in METHODS if "lion" in name or "sign" in name])
@pytest.mark.parametrize("workers", [1, 3])
def test_updates_below_half_a_unit_are_made(name: str, workers: int) -> None:
    """At 1, the next smaller bfloat16 is 2^-8 away: to nearest, steps of 1e-4 would all be lost."""
    parameter = torch.nn.Parameter(torch.ones(COUNT, dtype=torch.bfloat16))
    method, options = METHODS[name].optimizer, {"lr": 1e-4, **METHODS[name].fixed}
    if workers == 1:
        optimizer: torch.optim.Optimizer = method([parameter], **options)
    else:
        optimizer = VirtualWorkers([parameter], workers, method, **options)
    steps = 20
    for _ in range(steps):
        for rank in range(workers):
            parameter.grad = torch.full_like(parameter, 1.0 + rank)
            if isinstance(optimizer, VirtualWorkers):
                optimizer.next_worker()
        optimizer.step()
    assert float(parameter.detach().float().mean()) == pytest.approx(1 - steps * 1e-4, abs=1e-4)


def test_replicas_stay_equal() -> None:
    parameter = torch.nn.Parameter(torch.randn(40, 1000).to(torch.bfloat16))
    optimizer = VirtualWorkers([parameter], 3, DistributedLion, lr=1e-3, check_replicas_steps=1)
    for step in range(5):
        for rank in range(3):
            parameter.grad = torch.randn(40, 1000, generator=torch.Generator().manual_seed(10 * step + rank)).bfloat16()
            optimizer.next_worker()
        optimizer.step()
    first, *others = (member.param_groups[0]["params"][0].detach() for member in optimizer.members)
    assert all(torch.equal(first, other) for other in others)
