"""Wrong use: what was given, why not, what instead; the same error on every rank."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from hf_dlion import DistributedLion
from hf_dlion.trainer.methods import METHODS
from tests.harness import run_workers
from tests.optim.test_methods import one_group


def ones() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.ones(8))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0.*negative"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\)"),
        ({"betas": (0.9,)}, "there are two"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"aggregation": "median"}, "aggregation='median' is not known; it is one of 'mavo', 'avg'"),
        ({"tie": "random"}, "tie='random'"),
        ({"exchange": "ring"}, "exchange='ring'"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedLion(ones(), **options)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [
        (torch.zeros(3, dtype=torch.complex64), "complex64"),
        (torch.zeros(3).expand(4, 3), "not dense in memory"),
    ],
)
def test_parameters(parameter: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedLion([torch.nn.Parameter(parameter)])


def test_a_refused_group_is_not_added() -> None:
    optimizer = DistributedLion(ones())
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": ones(), "lr": -1})
    assert len(optimizer.param_groups) == 1


def test_parameters_that_are_mostly_frozen(caplog: pytest.LogCaptureFixture) -> None:
    frozen, trained = torch.nn.Parameter(torch.ones(30), requires_grad=False), torch.nn.Parameter(torch.ones(5))
    for given, warnings in (([frozen, trained], 1), ([trained], 0)):
        caplog.clear()
        optimizer = DistributedLion(given)
        for _ in range(2):
            trained.grad = torch.ones(5)
            optimizer.step()
        assert caplog.text.count("require no gradient") == warnings
    assert "Give it the others" not in caplog.text


def test_sparse_gradient() -> None:
    embedding = torch.nn.Embedding(5, 4, sparse=True)
    optimizer = DistributedLion(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_bad_gradient_of_a_single_worker() -> None:
    [parameter] = parameters = ones()
    optimizer = DistributedLion(parameters)
    parameter.grad = torch.full((8,), float("inf"))
    with pytest.raises(FloatingPointError, match=r"parameter 0, shape \(8,\), has a NaN or Inf at step 0"):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(8))


def outcome(step: Callable[[], Any]) -> str:
    try:
        step()
    except (RuntimeError, FloatingPointError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def misuse(rank: int, kind: str) -> str:
    parameters = ones() if kind != "another size" or rank == 0 else [torch.nn.Parameter(torch.ones(9))]
    if kind == "one more":
        parameters += ones() * rank
    if kind == "other weights":
        parameters = [torch.nn.Parameter(torch.full((8,), 1.0 + rank))]
    optimizer = DistributedLion(
        parameters,
        lr=0.1 + rank if kind == "another lr" else 0.1,
        tie="alternate" if kind == "another option" and rank == 1 else "zero",
        on_bad_gradient="raise",
    )
    for parameter in parameters:
        parameter.grad = torch.linspace(1, 2, parameter.numel()) * (1 if kind == "averaged" else rank + 1)
        if kind == "nan" and rank == 1:
            parameter.grad[3] = float("nan")
    before = [parameter.detach().clone() for parameter in parameters]
    message = outcome(optimizer.step)
    assert all(torch.equal(parameter, old) for parameter, old in zip(parameters, before, strict=True))
    return message


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("averaged", ["RuntimeError", "averaged before the step", "keep_gradients_local", "same data"]),
        ("another size", ["parameter 0 is float32 (8,)", "float32 (9,)", "on rank 1"]),
        ("one more", ["the size of param group 0 is 1 on rank 0 and 2 on rank 1"]),
        ("another lr", ["lr of param group 0 is 0.1 on rank 0 and 1.1 on rank 1"]),
        ("another option", ["tie is zero on rank 0 and alternate on rank 1"]),
        ("other weights", ["the parameters differ between the ranks", "the checksum of parameter 0", "on rank 0 and"]),
        ("nan", ["FloatingPointError", "rank 1", "parameter 0", "NaN or Inf", "step 0"]),
    ],
)
def test_every_rank_says_what_is_wrong(kind: str, parts: list[str]) -> None:
    messages = run_workers(misuse, 2, kind, timeout=60)
    for message in messages:
        for part in parts:
            assert part in message


def steps_apart(rank: int) -> str:
    parameters = ones()
    optimizer = DistributedLion(parameters)
    parameters[0].grad = torch.linspace(1, 2, 8) + rank
    optimizer.step()
    if rank == 1:
        optimizer.param_groups[0]["lr"] *= 2
    return outcome(optimizer.step)


def test_a_schedule_that_drifts_apart_is_found_at_its_step() -> None:
    for message in run_workers(steps_apart, 3, timeout=60):
        assert "lr of param group 0 is 0.0001 on ranks 0, 2 and 0.0002 on rank 1" in message


def replicas_apart(rank: int, name: str) -> list[str]:
    first, second = torch.nn.Parameter(torch.ones(8)), torch.nn.Parameter(torch.ones(5))
    method = METHODS[name]
    optimizer = method.optimizer([("first", first), ("second", second)], check_replicas_steps=3, **method.fixed)
    messages = []
    for step in range(5):
        if step == 1 and rank == 1:
            second.data[2] += 1e-6
        for parameter in (first, second):
            parameter.grad = torch.linspace(1, 2, len(parameter)) + rank
        messages.append(outcome(optimizer.step))
    return messages


@pytest.mark.parametrize("name", ["dlion_mavo", "glion"])
def test_replicas_that_drift_apart_are_found(name: str) -> None:
    for messages in run_workers(replicas_apart, 3, name, timeout=60):
        assert messages[:3] == ["no error"] * 3
        for part in ("no longer the same on all ranks at step 3", "1 (second)", "on ranks 0, 2 and", "on rank 1"):
            assert part in messages[3]


def zero_then_real(rank: int) -> str:
    parameters = ones()
    optimizer = DistributedLion(parameters)
    parameters[0].grad = torch.zeros(8)
    first = outcome(optimizer.step)
    parameters[0].grad = torch.ones(8)
    return first + ", " + outcome(optimizer.step)


def test_zero_gradients_do_not_hide_averaged_ones() -> None:
    for message in run_workers(zero_then_real, 2, timeout=60):
        assert message.startswith("no error, RuntimeError: all 2 workers have exactly the same gradients")


def votes_elsewhere(rank: int) -> str:
    group = dist.new_group([0, 1])
    parameters = ones()
    optimizer = DistributedLion(parameters, process_group=group)
    parameters[0].grad = torch.linspace(1, 2, 8) + rank
    return outcome(optimizer.step)


def test_a_rank_outside_the_process_group_is_told() -> None:
    inside, _, outside = run_workers(votes_elsewhere, 3, timeout=60)
    assert inside == "no error"
    assert "rank 2 is not in the process_group" in outside


def sharded(rank: int) -> list[list[str]]:
    """Parallel to others by tensors, sharded over replicas, too, and with no replica beside it."""
    mesh, two = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (2, 1))
    rows = torch.ones(8, 8)
    replicated = torch.nn.Parameter(distribute_tensor(rows, mesh, [Replicate()]))
    hybrid = torch.nn.Parameter(distribute_tensor(rows, two, [Replicate(), Shard(0)]))
    alone = torch.nn.Linear(8, 4)
    fully_shard(alone, mesh=mesh)
    messages = []
    for name in METHODS:
        make = partial(METHODS[name].optimizer, **METHODS[name].fixed)
        found = [outcome(partial(make, one_group(name, parameter))) for parameter in (replicated, hybrid)]
        messages.append([*found, outcome(make(one_group(name, alone.weight)).step)])
    return messages


def test_sharded_parameters_without_replicas_are_refused() -> None:
    for messages in run_workers(sharded, 2, timeout=60):
        for replicated, hybrid, alone in messages:
            assert "is placed as R" in replicated
            assert 'Give fully_shard the shard dimension alone, mesh=mesh["dp_shard"]' in hybrid
            assert "they have one vote together" in alone
