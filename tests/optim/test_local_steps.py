"""Local steps between votes, against a plain implementation over processes and virtual workers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from hf_dlion import DistributedLion, DistributedMuon
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


def lion(params: Any, **options: Any) -> torch.optim.Optimizer:
    return DistributedLion(params, lr=LR, weight_decay=DECAY, **options)


def _hidden(name: str, params: Any) -> Any:
    return groups(name, params) if isinstance(params[0], nn.Parameter) else params


VARIANTS: dict[str, tuple[Inner, dict[str, Any]]] = {
    "adamw": (adamw, {"every": 4}),
    "adamw at every step": (adamw, {"every": 1, "tie": "zero"}),
    "averages": (adamw, {"every": 3, "aggregation": "avg", "exchange": "gather", "nesterov": False}),
    "diloco": (adamw, {"every": 4, "aggregation": "mean", "outer_lr": 0.5, "outer_momentum": 0.8}),
    "muon": (muon, {"every": 4, "exchange": "sharded", "tie": "zero"}),
    "muloco": (muon, {"every": 4, "aggregation": "mean"}),
    "signs of muon": (signed_muon, {"every": 2, "outer_momentum": 0.0}),
    "lion": (lion, {"every": 5, "outer_lr": 1.0}),
    "sgd": (sgd, {"every": 4}),
}


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
    own = {"exchange"} & options.keys()
    ours = {"process_group": alone()}
    return ReferenceLocalSteps(
        parameters(),
        workers,
        lambda params: inner(params, **ours),
        **{k: v for k, v in options.items() if k not in own},
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
            _hidden("gmuon", params) if inner in (muon, signed_muon) else params, workers, method, **options
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
