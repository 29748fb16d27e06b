"""Virtual workers against as many processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_dlion import DistributedLion
from hf_dlion.optim.gadamw import GlobalAdamW
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.wire.ledger import Ledger
from tests.harness import run_workers
from tests.kernels import use_kernels
from tests.optim.test_methods import CASES, DECAY, LR, OPTIONS, STEPS, gradients, groups, parameters

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, OPTIONS.get(name, {})) for name in CASES),
    ("dlion_mavo", {"tie": "alternate", "exchange": "gather"}),
    ("dlion_mavo", {"tie": "zero", "exchange": "sharded"}),
    ("dmuon_mavo", {"tie": "alternate", "exchange": "sharded"}),
    ("graddrop", {"rule": "adamw"}),
]
Outcome = tuple[list[list[torch.Tensor]], list[dict[str, torch.Tensor]], Ledger]


def options(name: str, own: dict[str, Any]) -> dict[str, Any]:
    return {"lr": LR, "weight_decay": DECAY, **CASES[name].fixed, **own}


def received(rank: int, step: int) -> list[torch.Tensor | None]:
    """Gradients of which some are missing, and some zero: zero votes are part of it."""
    given: list[torch.Tensor | None] = list(gradients(rank, step))
    if rank == 1:
        given[0] = None
    if rank == 0:
        given[4] = torch.zeros_like(gradients(0, 0)[4])
    return given


def in_processes(rank: int) -> list[Outcome]:
    outcomes = []
    for name, own in VARIANTS:
        params = parameters()
        optimizer = CASES[name].optimizer(groups(name, params), **options(name, own))
        history = []
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = LR / (step + 1)
            for parameter, gradient in zip(params, received(rank, step), strict=True):
                parameter.grad = gradient
            optimizer.step()
            history.append([parameter.detach().clone() for parameter in params])
        outcomes.append((history, list(optimizer.state.values()), optimizer.ledger))
    return outcomes


def take_turns(optimizer: VirtualWorkers, params: Sequence[torch.nn.Parameter], step: int) -> None:
    for rank in range(optimizer.workers):
        for parameter, gradient in zip(params, received(rank, step), strict=True):
            parameter.grad = gradient
        optimizer.next_worker()


def virtually(workers: int, name: str, own: dict[str, Any], interrupted: bool = False) -> tuple[Any, VirtualWorkers]:
    params = parameters()

    def make() -> VirtualWorkers:
        return VirtualWorkers(groups(name, params), workers, CASES[name].optimizer, **options(name, own))

    optimizer = make()
    history = []
    for step in range(STEPS):
        if interrupted and step == STEPS // 2:
            state = optimizer.state_dict()
            optimizer = make()
            optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"] = LR / (step + 1)
        take_turns(optimizer, params, step)
        optimizer.step()
        history.append([parameter.detach().clone() for parameter in params])
    return history, optimizer


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_bitwise_what_processes_give(workers: int) -> None:
    outcomes = run_workers(in_processes, workers)
    for index, (name, own) in enumerate(VARIANTS):
        history, optimizer = virtually(workers, name, own)
        for step, (ours, theirs) in enumerate(zip(history, outcomes[0][index][0], strict=True)):
            assert all(map(torch.equal, ours, theirs)), (name, own, step)
        for rank, member in enumerate(optimizer.members):
            _, states, ledger = outcomes[rank][index]
            for state, theirs in zip(member.state.values(), states, strict=True):
                assert state.keys() == theirs.keys()
                assert all(torch.equal(state[key], theirs[key]) for key in state), (name, own, rank)
            assert member.ledger == ledger, (name, own, rank)


@pytest.mark.parametrize("name", CASES)
def test_goes_on_from_its_state(name: str) -> None:
    whole, parts = (virtually(3, name, OPTIONS.get(name, {}), interrupted)[0] for interrupted in (False, True))
    assert all(map(torch.equal, whole[-1], parts[-1]))


def test_bitwise_of_a_large_parameter() -> None:
    outcomes = run_workers(train_large, 2)
    parameter = large_parameter()
    optimizer = VirtualWorkers([parameter], 2, DistributedLion, lr=LR)
    for step in range(2):
        for rank in range(2):
            parameter.grad = large_gradient(rank, step)
            optimizer.next_worker()
        optimizer.step()
    assert torch.equal(parameter.detach(), outcomes[0])


def large_parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(2048, 2053))


def large_gradient(rank: int, step: int) -> torch.Tensor:
    return torch.randn(2048, 2053, generator=torch.Generator().manual_seed(10 * step + rank))


def train_large(rank: int) -> torch.Tensor:
    parameter = large_parameter()
    optimizer = DistributedLion([parameter], lr=LR)
    for step in range(2):
        parameter.grad = large_gradient(rank, step)
        optimizer.step()
    dist.barrier()
    return parameter.detach()


def test_thirty_two_workers_and_several_groups() -> None:
    params = parameters()
    groups = [{"params": params[:2], "lr": 0.5}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = VirtualWorkers(groups, 32, DistributedLion, lr=LR)
    added = torch.nn.Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": added, "lr": 1.0})
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, LR, 1.0]
    for rank in range(32):
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        added.grad = torch.tensor([1.0, -1.0, 1.0 if rank < 20 else -1.0])
        optimizer.next_worker()
    optimizer.step()
    assert torch.equal(added.detach(), torch.tensor([-1.0, 1.0, -1.0]))
    assert torch.equal(params[0].detach(), parameters()[0].detach() - 0.5)
    shares = optimizer.vote_shares()
    assert shares is not None
    assert 0.99 < shares.unanimous < 1


@pytest.mark.parametrize("adversary", ["flip", "random"])
def test_adversaries_send_what_is_not_theirs(adversary: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 1000))
    optimizer = VirtualWorkers([parameter], 3, GlobalAdamW, adversaries=1, adversary=adversary)
    for _ in range(3):
        parameter.grad = torch.tensor([1.0, 2.0]).view(2, 1).expand(2, 1000).clone()
        optimizer.next_worker()
    honest, _, other = (gradients[0] for gradients in optimizer.gradients)
    assert honest is not None
    assert other is not None
    assert honest[:, 0].tolist() == [1.0, 2.0]
    if adversary == "flip":
        assert torch.equal(other, -honest)
    else:
        assert torch.equal(other.abs(), honest)
        assert 400 < int((other > 0).sum()) / 2 < 600


def test_a_worker_without_a_turn_has_no_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = VirtualWorkers([parameter], 2, CASES["dlion_avg"].optimizer, aggregation="avg", lr=1.0)
    parameter.grad = torch.ones(4)
    optimizer.next_worker()
    optimizer.step()
    assert sorted(parameter.tolist()) == [-1.0, -1.0, 0.0, 0.0]  # zero votes alternate


def test_wrong_use_is_said() -> None:
    parameter = torch.nn.Parameter(torch.zeros(4))
    for options, message in (
        ({"workers": 1}, "workers=1"),
        ({"workers": 2, "adversaries": 3}, "adversaries=3"),
        ({"workers": 2, "adversary": "liar"}, "adversary='liar'.*'flip'"),
        ({"workers": 2, "lr": -1.0}, "lr=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            VirtualWorkers([parameter], method=DistributedLion, **options)  # type: ignore[arg-type]
    optimizer = VirtualWorkers([parameter], 2, DistributedLion, on_bad_gradient="raise")
    parameter.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"next_worker\(\)"):
        optimizer.step()
    with pytest.raises(ValueError, match="no virtual workers, and here are 2"):
        optimizer.load_state_dict(DistributedLion([parameter]).state_dict())
    optimizer.next_worker()
    parameter.grad = torch.full((4,), torch.nan)
    optimizer.next_worker()
    with pytest.raises(RuntimeError, match="all 2 workers have had their turn"):
        optimizer.next_worker()
    with pytest.raises(FloatingPointError, match="rank 1"):
        optimizer.step()
    optimizer = VirtualWorkers([parameter], 2, DistributedLion)
    for _ in range(2):
        parameter.grad = torch.ones(4)
        optimizer.next_worker()
    with pytest.raises(RuntimeError, match="exactly the same gradients"):
        optimizer.step()


@pytest.mark.parametrize("kernels", ["eager", "native"])
@pytest.mark.parametrize("workers", [1, 2])
def test_gradients_with_gaps(workers: int, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("optim.dlion.make_kernels", "optim.dlion.can_launch", "wire.exchange.can_launch"):
        monkeypatch.setattr(f"hf_dlion.{name}", None)  # put back after use_kernels
    use_kernels(kernels)
    trained = []
    for dense in (False, True):
        params = [torch.nn.Parameter(torch.ones(40_000)), torch.nn.Parameter(torch.ones(300))]
        optimizer: Any = DistributedLion(params, lr=LR)
        if workers > 1:
            optimizer = VirtualWorkers(params, workers, DistributedLion, lr=LR)
        for rank in range(workers):
            source = torch.Generator().manual_seed(rank)
            gradients = [torch.randn(80_000, generator=source)[::2], torch.randn(1, generator=source).expand(300)]
            for parameter, gradient in zip(params, gradients, strict=True):
                parameter.grad = gradient.clone(memory_format=torch.contiguous_format) if dense else gradient
            if workers > 1:
                optimizer.next_worker()
        optimizer.step()
        trained.append([parameter.detach() for parameter in params])
    assert all(map(torch.equal, *trained))
