"""Local steps between votes, against a plain implementation over processes and virtual workers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from hf_dlion import DistributedLion, DistributedMuon
from hf_dlion.optim import agreement
from hf_dlion.optim.bad_gradients import first_bad_gradient
from hf_dlion.optim.gmuon import GlobalMuon
from hf_dlion.optim.local_steps import LocalSteps
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.wire.groups import alone
from tests.harness import run_workers
from tests.optim.test_methods import DECAY, LR, gradients, groups, parameters
from tests.reference import ReferenceLocalSteps

Inner = Callable[..., torch.optim.Optimizer]
STEPS = 10
FROZEN = 4


def adamw(params: Any, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=LR, weight_decay=DECAY)


def sgd(params: Any, **_: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=LR, momentum=0.9)


def muon(params: Any, **options: Any) -> torch.optim.Optimizer:
    return GlobalMuon(_hidden("gmuon", params), lr=LR, weight_decay=DECAY, **options)


def signed_muon(params: Any, **options: Any) -> torch.optim.Optimizer:
    return DistributedMuon(_hidden("dmuon_mavo", params), lr=LR, weight_decay=DECAY, **options)


def signed_muon_and_adamw(params: Any, **options: Any) -> torch.optim.Optimizer:
    return DistributedMuon(_hidden("dmuon_mavo", params), lr=LR, weight_decay=DECAY, rest="average", **options)


def lion(params: Any, **options: Any) -> torch.optim.Optimizer:
    return DistributedLion(params, lr=LR, weight_decay=DECAY, **options)


def _hidden(name: str, params: Any) -> Any:
    return groups(name, params) if isinstance(params[0], nn.Parameter) else params


MOMENTUM = {"outer_lr": 0.7, "outer_momentum": 0.9}

VARIANTS: dict[str, tuple[Inner, dict[str, Any]]] = {
    "adamw": (adamw, {"every": 4, **MOMENTUM}),
    "adamw at every step": (adamw, {"every": 1, "tie": "zero"}),
    "averages": (adamw, {"every": 3, "aggregation": "avg", "exchange": "gather", "nesterov": False, **MOMENTUM}),
    "diloco": (adamw, {"every": 4, "aggregation": "mean", "outer_lr": 0.5, "outer_momentum": 0.8}),
    "muon": (muon, {"every": 4, "exchange": "sharded", "tie": "zero"}),
    "muloco": (muon, {"every": 4, "aggregation": "mean"}),
    "signs of muon": (signed_muon, {"every": 2}),
    "signs of muon, and adamw": (signed_muon_and_adamw, {"every": 3}),
    "lion": (lion, {"every": 5, "outer_lr": 0.5}),
    "sgd": (sgd, {"every": 4}),
    "fragments": (adamw, {"every": 5, "fragments": 3, **MOMENTUM}),
    "delay": (adamw, {"every": 4, "delay": 3}),
    "streaming": (muon, {"every": 6, "fragments": 3, "delay": 2, **MOMENTUM}),
    "streaming means": (adamw, {"every": 4, "fragments": 2, "delay": 1, "aggregation": "mean"}),
}

PARTS: dict[str, dict[int, list[int]]] = {
    "fragments": {1: [0, 1], 3: [2], 5: [3, 4]},
    "streaming": {2: [0, 1, 3], 4: [2], 6: [4]},
    "streaming means": {2: [0, 1, 2], 4: [3, 4]},
}
"""By steps of a round, which parameters vote after so many."""


def received(rank: int, step: int) -> list[torch.Tensor | None]:
    """Gradients of which some are missing on a worker, or zero, and one on all."""
    given: list[torch.Tensor | None] = list(gradients(rank, step))
    if rank == 1:
        given[0] = None
    if rank == 0:
        given[2] = torch.zeros_like(gradients(0, 0)[2])
    given[FROZEN] = None
    return given


def give(params: Sequence[nn.Parameter], given: Sequence[torch.Tensor | None]) -> None:
    for parameter, gradient in zip(params, given, strict=True):
        parameter.grad = gradient


def one(workers: int, every: int, **options: Any) -> tuple[nn.Parameter, VirtualWorkers]:
    parameter = nn.Parameter(torch.zeros(300))

    def method(given: Any, **keywords: Any) -> LocalSteps:
        return LocalSteps(torch.optim.SGD(given, lr=1.0), every=every, **keywords)

    return parameter, VirtualWorkers([("weight", parameter)], workers, method, outer_lr=0.7, **options)


def step_once(parameter: nn.Parameter, optimizer: VirtualWorkers, values: Sequence[float]) -> None:
    for value in values:
        parameter.grad = torch.full_like(parameter, value)
        optimizer.next_worker()
    optimizer.step()


def in_process(rank: int, interrupted: bool = False) -> dict[str, Any]:
    """By variant, the parameters after each step, x_0 at the end, and the ledger."""
    found = {}
    for name, (inner, options) in VARIANTS.items():
        params = parameters()
        optimizer = LocalSteps(inner(params), **options)
        history = []
        for step in range(STEPS):
            if interrupted and step == STEPS // 2:
                state = optimizer.state_dict()
                params = parameters()
                optimizer = LocalSteps(inner(params), **options)
                optimizer.load_state_dict(state)
                if not optimizer.between_votes:  # the model is saved by itself
                    for parameter, before in zip(params, history[-1], strict=True):
                        parameter.data.copy_(before)
            give(params, received(rank, step))
            optimizer.step()
            history.append([parameter.detach().clone() for parameter in params])
        with optimizer.voted_parameters():
            voted = [parameter.detach().clone() for parameter in params]
        assert all(map(torch.equal, history[-1], params))
        found[name] = (history, voted, optimizer.ledger)
    return found


def reference(name: str, workers: int) -> ReferenceLocalSteps:
    inner, options = VARIANTS[name]
    own = {"exchange", "fragments"} & options.keys()
    ours = {"process_group": alone()}
    given = {name: value for name, value in options.items() if name not in own}
    return ReferenceLocalSteps(
        parameters(), workers, lambda params: inner(params, **ours), **given, parts=PARTS.get(name)
    )


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_processes_are_the_plain_implementation(workers: int) -> None:
    outcomes = run_workers(in_process, workers) if workers > 1 else [in_process(0)]
    for name in VARIANTS:
        plain = reference(name, workers)
        for step in range(STEPS):
            plain.step([received(rank, step) for rank in range(workers)])
            for rank in range(workers):
                assert all(map(torch.equal, outcomes[rank][name][0][step], plain.own[rank])), (name, step, rank)
        for rank in range(workers):
            assert all(map(torch.equal, outcomes[rank][name][1], plain.voted)), (name, rank)
            assert torch.equal(outcomes[rank][name][1][FROZEN], parameters()[FROZEN]), name


def virtually(name: str, workers: int, interrupted: bool = False) -> tuple[list[Any], VirtualWorkers]:
    """The first worker's parameters after each step."""
    inner, options = VARIANTS[name]

    def method(given: Any, **keywords: Any) -> LocalSteps:
        return LocalSteps(inner(given), **keywords)

    def make(params: Any) -> VirtualWorkers:
        return VirtualWorkers(
            _hidden("gmuon", params) if inner in (muon, signed_muon, signed_muon_and_adamw) else params,
            workers,
            method,
            **options,
        )

    params = parameters()
    optimizer = make(params)
    history: list[Any] = []
    for step in range(STEPS):
        if interrupted and step == STEPS // 2:
            state = optimizer.state_dict()
            params = parameters()
            optimizer = make(params)
            optimizer.load_state_dict(state)
            if not optimizer.members[0].between_votes:
                for parameter, before in zip(params, history[-1], strict=True):
                    parameter.data.copy_(before)
        for rank in range(workers):
            give(params, received(rank, step))
            optimizer.next_worker()
        optimizer.step()
        history.append([parameter.detach().clone() for parameter in params])
    return history, optimizer


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("name", VARIANTS)
def test_virtual_workers_are_the_plain_implementation(name: str, workers: int) -> None:
    history, optimizer = virtually(name, workers)
    plain = reference(name, workers)
    for step in range(STEPS):
        plain.step([received(rank, step) for rank in range(workers)])
        assert all(map(torch.equal, history[step], plain.own[0])), step
    optimizer.vote()
    plain.vote()
    for member in optimizer.members:
        theirs = [parameter for group in member.param_groups for parameter in group["params"]]
        by_shape = {parameter.shape: parameter for parameter in theirs}
        assert all(torch.equal(by_shape[x.shape], x) for x in plain.voted)


@pytest.mark.parametrize("name", VARIANTS)
def test_goes_on_from_its_state(name: str) -> None:
    whole, parts = (virtually(name, 3, interrupted)[0] for interrupted in (False, True))
    for one, other in zip(whole, parts, strict=True):
        assert all(map(torch.equal, one, other))


# What torch, schedulers and models do with it


@pytest.mark.parametrize(("before", "after"), [(MOMENTUM, {}), ({}, MOMENTUM)], ids=["with", "without"])
def test_a_state_dict_says_whether_there_is_a_momentum(before: Any, after: Any) -> None:
    found = []
    for loads in (False, True):
        parameter = nn.Parameter(torch.zeros(300))
        optimizer = LocalSteps(torch.optim.SGD([parameter], lr=1.0), every=2, **before)
        for step in range(6):
            if loads and step == 4:
                state = optimizer.state_dict()
                assert set(state["state"][0]) == {"anchor", *(["momentum_buffer"] if before else [])}
                optimizer = LocalSteps(torch.optim.SGD([parameter], lr=1.0), every=2, **after)
                optimizer.load_state_dict(state)
            parameter.grad = torch.full_like(parameter, 1.0 + step)
            optimizer.step()
        found.append(parameter.detach())
    assert torch.equal(*found)


def test_a_scheduler_and_the_inner_optimizer_share_the_groups() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    optimizer = LocalSteps(sgd([parameter]), every=3, **MOMENTUM)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    for step in range(4):
        assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(LR / (step + 1))
        parameter.grad = torch.ones(3)
        optimizer.step()
        scheduler.step()
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=9)  # looks for a momentum in the defaults
    optimizer.param_groups[0].update(lr=LR / 5, momentum=0.9)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is optimizer.inner.param_groups
    other = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [other], "lr": 1.0})
    assert optimizer.between_votes
    assert [len(group["params"]) for group in optimizer.inner.param_groups] == [1, 1]
    other.grad = torch.ones(2)
    for _ in range(2):
        optimizer.step()
    assert not optimizer.between_votes
    torch.testing.assert_close(other.detach(), torch.full((2,), -0.7 * 1.9 * 2.9))
    with pytest.raises(ValueError, match="sparse|layout"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.eye(2).to_sparse())]})
    assert len(optimizer.param_groups) == 2


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_as_the_original(copied: Callable[[Any], Any], delay: int, workers: int) -> None:
    params = parameters()
    options: dict[str, Any] = {"every": 4 - delay // 2, "delay": delay}  # with a delay, a vote is on its way
    optimizer: Any = LocalSteps(adamw(params), **options)
    if workers > 1:
        optimizer = VirtualWorkers(params, 2, by_adamw, **options)

    def step(params: Any, optimizer: Any, number: int) -> None:
        for rank in range(workers):
            give(params, received(rank, number))
            if workers > 1:
                optimizer.next_worker()
        optimizer.step()

    for number in range(3):
        step(params, optimizer, number)
    others, other = copied((params, optimizer))
    for number in range(3, 6):
        step(params, optimizer, number)
        step(others, other, number)
        assert all(map(torch.equal, params, others)), number
    assert not torch.equal(params[0], parameters()[0])


def by_adamw(given: Any, **keywords: Any) -> LocalSteps:
    return LocalSteps(torch.optim.AdamW(given, lr=LR), **keywords)


def converted(rank: int) -> list[torch.Tensor]:
    """bfloat16 weights, one in channels_last; a layer becomes float32 in the middle of a round."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 4, 3)).bfloat16().to(memory_format=torch.channels_last)
    optimizer = by_adamw(layers.parameters(), every=3)
    history = []
    for step in range(9):
        if step == 4:
            layers[1].float()
        for index, parameter in enumerate(layers.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=seeded(rank, step, index)).to(parameter)
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
            optimizer.inner.state[parameter] = {
                name: torch.empty_like(parameter).copy_(tensor) if tensor.dim() else tensor
                for name, tensor in optimizer.inner.state[parameter].items()
            }
        optimizer.step()
        history.append(torch.cat([parameter.detach().float().flatten() for parameter in layers.parameters()]))
    assert layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [parameter.dtype for parameter in layers.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
    return history


def seeded(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(number * 100**place for place, number in enumerate(numbers)))


def test_bfloat16_memory_formats_and_conversions() -> None:
    first, second = run_workers(converted, 2)
    for step, (one, other) in enumerate(zip(first, second, strict=True)):
        assert torch.equal(one, other) == (step % 3 == 2), step
    assert not torch.equal(first[2], first[5])


def test_virtual_workers_are_converted_each() -> None:
    parameter, optimizer = one(2, 2)
    step_once(parameter, optimizer, [1.0, 3.0])
    parameter.data = parameter.data.bfloat16()
    step_once(parameter, optimizer, [1.0, 3.0])
    assert parameter.dtype == torch.bfloat16
    torch.testing.assert_close(parameter.detach().float(), torch.full((300,), -0.7 * 4.0), rtol=1e-2, atol=0)


@pytest.mark.parametrize("fragments", [1, 4])
@pytest.mark.parametrize(
    ("aggregation", "workers", "bits"),
    [("mavo", 4, 1.5 + 0.1875), ("mavo", 2, 1 + 0.125), ("avg", 3, 2 + 1 / 6), ("mean", 4, 48)],
)
def test_bits_are_an_H_th(aggregation: str, workers: int, bits: float, fragments: int) -> None:
    sizes = [120_000, 80_000, 80_000, 120_000]
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    optimizer = VirtualWorkers(parameters, workers, by_adamw, every=16, aggregation=aggregation, fragments=fragments)
    for step in range(32):
        for rank in range(workers):
            for index, parameter in enumerate(parameters):
                parameter.grad = torch.randn(sizes[index], generator=seeded(rank, step))
            optimizer.next_worker()
        optimizer.step()
    sent = 8 * optimizer.ledger.sent_bytes / sum(sizes) / optimizer.ledger.steps
    assert optimizer.ledger.steps == 32
    assert bits / 16 < sent < bits / 16 * 1.02
    if aggregation == "mavo" and workers == 4:
        assert sent < 0.2


def test_an_error_with_a_delay_ends_its_vote_and_no_other() -> None:
    parameter, optimizer = one(2, 2, on_bad_gradient="raise", delay=1)
    step_once(parameter, optimizer, [1.0, torch.inf])
    with pytest.raises(FloatingPointError, match="rank 1: the gradient of parameter 0"):
        step_once(parameter, optimizer, [1.0, 2.0])
    torch.testing.assert_close(parameter.detach(), torch.full((300,), -2.0))  # the first worker's own
    for _ in range(3):
        step_once(parameter, optimizer, [1.0, 2.0])
    # Sent after 4 steps, the first worker has moved by 4, the second by 6; one step more since then.
    torch.testing.assert_close(parameter.detach(), torch.full((300,), -0.7 * 5.0 - 1.0))
    optimizer.vote()
    torch.testing.assert_close(parameter.detach(), torch.full((300,), -0.7 * 5.0 - 0.7 * 1.5))


def converted_on_its_way(rank: int) -> list[torch.Tensor]:
    parameter = nn.Parameter(torch.zeros(300))
    optimizer = LocalSteps(torch.optim.SGD([parameter], lr=1.0), every=4, outer_lr=0.7, delay=2)
    for step in range(8):
        if step == 5:
            parameter.data = parameter.data.bfloat16()
        parameter.grad = torch.full_like(parameter, 1.0 + rank)
        optimizer.step()
    optimizer.vote()
    return [parameter.detach(), optimizer.state[parameter]["anchor"]]


def test_a_conversion_with_a_vote_on_its_way() -> None:
    first, second = run_workers(converted_on_its_way, 2)
    assert first[0].dtype == torch.bfloat16
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first[1], torch.full((300,), -0.7 * 2 * 6.0), rtol=2e-2, atol=0)


@pytest.mark.parametrize("inner", [adamw, lion, signed_muon_and_adamw, muon])
def test_gradients_are_read_once_for_bad_ones(inner: Inner, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    def count(given: Sequence[Any]) -> int:
        read.append(sum(gradient is not None for gradient in given))
        return first_bad_gradient(given)

    monkeypatch.setattr(agreement, "first_bad_gradient", count)
    params = parameters()
    optimizer = LocalSteps(inner(params), every=3)
    for step in range(2):
        for parameter, gradient in zip(params, gradients(0, step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    assert sum(read) == 2 * len(params)
