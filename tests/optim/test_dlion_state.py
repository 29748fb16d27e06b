"""What a torch optimizer does besides stepping, and what holds over many steps."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_dlion import DistributedLion
from hf_dlion.optim import dlion, layout
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.methods import METHODS
from hf_dlion.wire.shares import VoteShares
from tests.harness import run_workers, what_is_logged
from tests.optim.test_dlion import flatten, same_on_all_ranks


def random_gradients(parameters: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def plain_lion(x: torch.Tensor, gradients: list[torch.Tensor], lr: float, weight_decay: float) -> torch.Tensor:
    """Lion as Chen et al. (2023), Algorithm 2, have it."""
    m = torch.zeros_like(x)
    for g in gradients:
        u = 0.9 * m + (1 - 0.9) * g
        x = x - lr * (torch.sign(u) + weight_decay * x)
        m = 0.99 * m + (1 - 0.99) * g
    return x


def test_one_worker_without_a_process_group_is_lion() -> None:
    start = torch.randn(50, 41, generator=torch.Generator().manual_seed(0))
    drawn = [torch.randn(50, 41, generator=torch.Generator().manual_seed(s)) * (s % 3 > 0) for s in range(9)]
    parameter, idle = torch.nn.Parameter(start.clone()), torch.nn.Parameter(torch.ones(3))
    optimizer = DistributedLion([parameter, idle], lr=1e-2, weight_decay=0.1)
    for gradient in drawn:
        parameter.grad = gradient
        optimizer.step()
    assert torch.equal(parameter.detach(), plain_lion(start, drawn, 1e-2, 0.1))
    assert torch.equal(idle.detach(), torch.ones(3)), "a parameter without a gradient moved"


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = DistributedLion([parameter], lr=0.5)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (parameter**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3
    assert parameter.tolist() == [0.5, 0.5, 0.5]


def groups_have_their_own_settings(rank: int) -> None:
    first, second, late = (torch.nn.Parameter(torch.ones(5)) for _ in range(3))
    optimizer = DistributedLion([{"params": [first], "lr": 0.1}, {"params": [second], "weight_decay": 0.5}], lr=0.01)
    for parameter in (first, second):
        parameter.grad = torch.full((5,), 1.0 + rank)
    optimizer.step()
    assert torch.allclose(first, torch.full((5,), 0.9))
    assert torch.allclose(second, torch.full((5,), 1 - 0.01 * 1.5))
    optimizer.add_param_group({"params": [late], "lr": 0.2})
    late.grad = torch.full((5,), -1.0 - rank)
    optimizer.step()
    assert torch.allclose(late, torch.full((5,), 1.2))
    assert [group["step"] for group in optimizer.param_groups] == [2, 2, 2]


def test_param_groups_and_a_late_one() -> None:
    run_workers(groups_have_their_own_settings, 2)


def resumes_where_it_stopped(rank: int, dtype: torch.dtype) -> None:
    def made() -> tuple[list[torch.nn.Parameter], DistributedLion]:
        torch.manual_seed(0)
        mine = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((7, 5), (20000,))]
        return mine, DistributedLion([{"params": mine[:1]}, {"params": mine[1:], "lr": 1e-2}], weight_decay=0.1)

    mine, optimizer = made()
    for step in range(3):
        random_gradients(mine, 100 * step + rank)
        optimizer.step()
    state, weights = copy.deepcopy(optimizer.state_dict()), [parameter.detach().clone() for parameter in mine]
    others, resumed = made()
    for parameter, weight in zip(others, weights, strict=True):
        parameter.data = weight
    resumed.load_state_dict(state)
    assert all(resumed.state[parameter]["momentum"].dtype == torch.float32 for parameter in others)
    for step in range(3, 8):
        for parameters, one in ((mine, optimizer), (others, resumed)):
            random_gradients(parameters, 100 * step + rank)
            one.step()
    assert torch.equal(flatten(mine), flatten(others))
    for one, other in zip(mine, others, strict=True):
        assert torch.equal(optimizer.state[one]["momentum"], resumed.state[other]["momentum"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_resumes_bit_for_bit(dtype: torch.dtype) -> None:
    run_workers(resumes_where_it_stopped, 3, dtype)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: DistributedLion([torch.nn.Parameter(torch.ones(3))]), r"shape \(4,\).*it has shape \(3,\)"),
        (lambda: torch.optim.AdamW([torch.nn.Parameter(torch.ones(4))]), "there is none"),
    ],
)
def test_the_state_of_something_else_is_refused(made: Any, message: str) -> None:
    optimizer = made()
    random_gradients([parameter for group in optimizer.param_groups for parameter in group["params"]], 0)
    optimizer.step()
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=message):
        DistributedLion([torch.nn.Parameter(torch.ones(4))]).load_state_dict(state)


def idle_weights_stay(rank: int, workers: int, aggregation: str, tie: str) -> float:
    lr, decay, steps = 1e-3, 0.1, 300
    idle, busy = torch.nn.Parameter(torch.linspace(-1, 1, 333)), torch.nn.Parameter(torch.zeros(40))
    optimizer = DistributedLion([idle, busy], lr=lr, weight_decay=decay, aggregation=aggregation, tie=tie)
    decayed = idle.detach().clone()
    furthest = 0.0
    for step in range(steps):
        random_gradients([busy], 10 * step + rank)
        idle.grad = torch.zeros_like(idle) if rank == 0 or aggregation == "mavo" else None
        optimizer.step()
        decayed -= lr * decay * decayed
        furthest = max(furthest, float((idle.detach() - decayed).abs().max()) / lr)
    assert same_on_all_ranks(flatten([idle, busy]), workers)
    return furthest


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize(("aggregation", "tie"), [("mavo", "alternate"), ("avg", "zero")])
def test_a_weight_with_gradients_of_zero_does_not_drift(workers: int, aggregation: str, tie: str) -> None:
    furthest = run_workers(idle_weights_stay, workers, workers, aggregation, tie)
    assert max(furthest) < 2


def a_missing_gradient_votes_zero(rank: int) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(6)), torch.nn.Parameter(torch.zeros(32, 1024))]
    optimizer = DistributedLion(parameters, lr=1.0)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    parameters[0].grad[0] = 1 + rank
    optimizer.step()
    kept = [optimizer.state[parameter]["momentum"].clone() for parameter in parameters]
    # Two of three vote for a decrease, so the third's zero vote changes nothing.
    for parameter in parameters:
        parameter.grad = None if rank == 2 else torch.ones_like(parameter)
    optimizer.step()
    for parameter, momentum in zip(parameters, kept, strict=True):
        assert torch.equal(parameter.detach(), torch.full_like(parameter, -2.0))
        assert torch.equal(optimizer.state[parameter]["momentum"], momentum) == (rank == 2)


def test_a_gradient_missing_on_one_rank_votes_zero() -> None:
    run_workers(a_missing_gradient_votes_zero, 3)


def tied_and_strided(rank: int) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(8, 6).t())  # not contiguous, but dense
    image = torch.nn.Parameter(torch.randn(2, 3, 40, 40).contiguous(memory_format=torch.channels_last))
    plain = [
        torch.nn.Parameter(parameter.detach().clone(memory_format=torch.contiguous_format))
        for parameter in (weight, image)
    ]
    optimizers = [DistributedLion([weight, image], lr=0.1), DistributedLion(plain, lr=0.1)]
    for step in range(3):
        random_gradients([weight, image], 10 * step + rank)
        random_gradients(plain, 10 * step + rank)
        for optimizer in optimizers:
            optimizer.step()
    # Every element has its own gradient on each rank, so no vote is a tie and the layout does not matter.
    assert torch.equal(weight, plain[0])
    assert torch.equal(image, plain[1])
    assert weight.stride() == (1, 6)
    assert optimizers[0].state[image]["momentum"].stride() == image.stride()


def test_strided_parameters() -> None:
    run_workers(tied_and_strided, 3)


def votes_in_its_group(rank: int) -> None:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = DistributedLion([parameter], lr=1.0, process_group=groups[rank // 2])
    parameter.grad = torch.full((4,), (1.0 + rank) if rank < 2 else -(1.0 + rank))
    optimizer.step()
    assert optimizer.workers == 2
    assert parameter.tolist() == [-1.0] * 4 if rank < 2 else [1.0] * 4


def test_process_groups_vote_apart() -> None:
    run_workers(votes_in_its_group, 4)


def several_buckets(rank: int) -> None:
    layout.MAX_BUCKET_BLOCKS, layout.MIN_BUCKET_BLOCKS, layout.SEGMENT_BLOCKS = 20, 20, 17
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(shape)) for shape in ((40000,), (70, 70), (300,), (21, 1024))]
    same = [torch.nn.Parameter(parameter.detach().clone()) for parameter in mine]
    small = DistributedLion(mine, lr=0.1)
    for step in range(3):
        random_gradients(mine, 10 * step + rank)
        small.step()
    assert len(small._plan.buckets) > 3
    layout.MAX_BUCKET_BLOCKS, layout.MIN_BUCKET_BLOCKS, layout.SEGMENT_BLOCKS = 1 << 14, 1 << 11, 1 << 11
    large = DistributedLion(same, lr=0.1)
    for step in range(3):
        random_gradients(same, 10 * step + rank)
        large.step()
    assert len(large._plan.buckets) == 1
    assert torch.equal(flatten(mine), flatten(same))
    assert same_on_all_ranks(flatten(mine), 3)


def test_buckets_do_not_change_the_result() -> None:
    run_workers(several_buckets, 3)


def shares(rank: int) -> list[VoteShares | None]:
    # Of 400 parameters, all four agree on 100, and two against two on 200; on 100 it is three against one.
    parameter = torch.nn.Parameter(torch.zeros(400))
    optimizer = DistributedLion([parameter])
    gradient = torch.ones(400)
    gradient[100:300] *= 1 if rank < 2 else -1
    gradient[300:] *= -1 if rank == 0 else 1
    parameter.grad = gradient
    optimizer.step()
    optimizer.step()
    return [optimizer.vote_shares(), optimizer.vote_shares()]


def test_vote_shares_leave_padding_out_and_start_over() -> None:
    for first, second in run_workers(shares, 4):
        assert first == VoteShares(ties=0.5, unanimous=0.25)
        assert second is None


def test_padding_is_left_out_to_the_last_vote() -> None:
    parameter = torch.nn.Parameter(torch.zeros(121))
    optimizer = VirtualWorkers([parameter], 3, DistributedLion, exchange="sharded")
    for rank in range(3):
        parameter.grad = torch.full((121,), 1.0 + rank)
        optimizer.next_worker()
    optimizer.step()
    assert optimizer.vote_shares() == VoteShares(ties=0.0, unanimous=1.0)


def falls_back_to_eager(rank: int) -> str:
    records = what_is_logged()
    dlion.NATIVE_FROM = 0
    if rank == 1:
        os.environ["CC"] = "no-compiler-here"
    parameter = torch.nn.Parameter(torch.zeros(3000))
    optimizer = DistributedLion([parameter], lr=1.0)
    parameter.grad = torch.full((3000,), 1.0 + rank)
    optimizer.step()
    assert not optimizer._plan.compiled
    assert torch.equal(parameter.detach(), torch.full((3000,), -1.0))
    return "".join(records)


def test_one_rank_that_cannot_compile_makes_all_go_eager() -> None:
    first, second = run_workers(falls_back_to_eager, 2, timeout=200)
    assert "no-compiler-here" in second
    assert first == ""


LARGE = [(20_000_000,)]
"""Parameters that fill one bucket of votes and start another; more buckets add nothing."""


def peak_of_steps(rank: int, shapes: list[tuple[int, ...]], name: str) -> float:
    """MiB that two steps, with all comparisons, need at their peak, beyond parameters, gradients and state."""
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    options = {**METHODS[name].fixed, "check_replicas_steps": 1}
    groups = [{"params": parameters, "orthogonal": True}] if name == "dmuon_mavo" else parameters
    optimizer = METHODS[name].optimizer(groups, **options)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1.0 + rank)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    optimizer.step()
    optimizer.step()
    state = sum(value.nbytes for held in optimizer.state.values() for value in held.values())
    return (resident("VmHWM") - before) / 1024 - state / 2**20


def warm_peak_of_steps(rank: int, shapes: list[tuple[int, ...]], name: str) -> float:
    """As that, of a process that has all code in memory."""
    peak_of_steps(rank, [(8, 1 << 17)], name)
    return peak_of_steps(rank, shapes, name)


def resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise KeyError(key)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("workers", "name", "shapes"),
    [
        (2, "dlion_mavo", LARGE),
        (3, "dlion_mavo", LARGE),
        (2, "dlion_avg", LARGE),
        (2, "dmuon_mavo", [(128, 1024)] * 153),
        (2, "glion", LARGE),
        (3, "gadamw", LARGE),
        (2, "terngrad", LARGE),
    ],
)
def test_memory_of_a_step_is_bounded(workers: int, name: str, shapes: list[tuple[int, ...]]) -> None:
    # 64, and what is lost between pieces of memory.
    assert max(run_workers(warm_peak_of_steps, workers, shapes, name)) < 76
