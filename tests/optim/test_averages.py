"""Votes on hidden matrices beside averages of the rest, against the plain reference and torch's AdamW."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_dlion import DistributedMuon, LocalSteps, load_workers, save_workers
from hf_dlion.checkpoint.manifest import CheckpointError
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.wire.ledger import Ledger
from tests.harness import run_workers
from tests.optim.test_dlion import flatten, same_on_all_ranks
from tests.optim.test_muon import (
    HIDDEN_BETAS,
    REST,
    SETTINGS,
    flat_or_zeros,
    gradients,
    groups_of,
    parameters,
    reference,
)

STEPS = 8
ADAMW: dict[str, Any] = {"betas": (0.8, 0.9), "eps": 1e-5}
CASES = [("mavo", "zero", "gather"), ("mavo", "alternate", "sharded"), ("avg", "zero", "sharded")]
REST_SIZE = sum(torch.Size(shape).numel() for shape in REST)


def given(rank: int, step: int) -> list[Tensor | None]:
    """Of the rest, one is missing on rank 1, one on all in two steps; rank 0 has a bad one in step 5."""
    drawn = gradients(rank, step, missing=False)
    if rank == 1 and step % 2:
        drawn[0] = None
    if step in (2, 3):
        drawn[3] = None
    if rank == 0 and step == 5:
        drawn[0] = torch.full_like(drawn[0], torch.nan)  # type: ignore[arg-type]
    return drawn


def mean_gradients(everyone: list[list[Tensor | None]]) -> list[Tensor | None]:
    """Of those who have no bad one; missing ones count as zeros, and stay missing where all are."""
    good = [drawn for drawn in everyone if all(g is None or g.isfinite().all() for g in drawn)]
    means: list[Tensor | None] = []
    for index, shape in enumerate(REST):
        found = [torch.zeros(shape) if drawn[index] is None else drawn[index] for drawn in good]
        total = torch.stack([one for one in found if one is not None]).sum(0)
        means.append(None if all(drawn[index] is None for drawn in good) else total / len(good))
    return means


def follow(rank: int, workers: int) -> None:
    for aggregation, tie, exchange in CASES:
        case = f"{aggregation} {tie} {exchange}"
        mine, options = parameters(), {"aggregation": aggregation, "tie": tie}
        settings = SETTINGS | ADAMW | options
        optimizer = DistributedMuon(
            groups_of(mine), exchange=exchange, hidden_betas=HIDDEN_BETAS, rest="average", **settings
        )
        votes = reference(mine, workers, **options)
        rest = [parameter.detach().clone().requires_grad_() for parameter in mine[: len(REST)]]
        adamw = torch.optim.AdamW(rest, lr=SETTINGS["lr"], weight_decay=SETTINGS["weight_decay"], **ADAMW)
        for step in range(STEPS):
            if step == STEPS // 2:
                optimizer = pickle.loads(pickle.dumps(optimizer))
                mine = optimizer.param_groups[0]["params"] + [g["params"][0] for g in optimizer.param_groups[1:]]
            everyone = [given(other, step) for other in range(workers)]
            alone = workers == 1 and step == 5
            for parameter, gradient in zip(mine, everyone[rank], strict=True):
                parameter.grad = torch.zeros_like(parameter) if alone else gradient
            if alone:
                everyone[0] = [parameter.grad for parameter in mine]
            before = [copy.deepcopy(optimizer.state[parameter]) for parameter in mine[len(REST) :]]
            optimizer.step()
            bad = step == 5 and not alone
            votes.step([None if bad and r == 0 else flat_or_zeros(drawn) for r, drawn in enumerate(everyone)])
            for parameter, gradient in zip(rest, mean_gradients(everyone), strict=True):
                parameter.grad = gradient
                if step:
                    adamw.state[parameter]["step"].fill_(step)  # the optimizer's, where torch has each parameter's own
            adamw.step()
            what = f"{case} after step {step}"
            assert same_on_all_ranks(flatten(mine), workers), what
            assert torch.equal(flatten(mine)[REST_SIZE:], votes.parameters[REST_SIZE:]), what
            for parameter, expected in zip(mine, rest, strict=False):
                assert torch.equal(parameter, expected), what
                held = {name: held for name, held in adamw.state[expected].items() if name != "step"}
                for name, tensor in held.items():
                    assert torch.equal(optimizer.state[parameter][name], tensor), f"{name}, {what}"
                assert optimizer.state[parameter].keys() == {"exp_avg", "exp_avg_sq"}
            if bad and rank == 0:
                after = [optimizer.state[parameter] for parameter in mine[len(REST) :]]
                assert all(torch.equal(a["momentum"], b["momentum"]) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_equals_the_reference(workers: int) -> None:
    run_workers(follow, workers, workers)


def sent(method_options: dict[str, Any]) -> Ledger:
    params = parameters()
    optimizer = VirtualWorkers(groups_of(params), 4, DistributedMuon, **SETTINGS, **method_options)
    for step in range(3):
        for rank in range(4):
            for parameter, gradient in zip(params, gradients(rank, step, missing=False), strict=True):
                parameter.grad = gradient
            optimizer.next_worker()
        optimizer.step()
    return optimizer.ledger


def test_it_sends_the_votes_on_matrices_and_the_rest_in_float32() -> None:
    averaged, voted = sent({"rest": "average"}), sent({})
    padded = -(-REST_SIZE // 4) * 4
    block = 2 * 3 * (1024 // 8) // 4  # of the rest, which no longer votes: up and down
    assert averaged.sent_bytes - voted.sent_bytes == 3 * 2 * 3 * padded - 3 * block


def test_states_of_the_other_kind_are_refused() -> None:
    def made(rest: str) -> DistributedMuon:
        params = parameters()
        optimizer = DistributedMuon(groups_of(params), rest=rest, **SETTINGS)
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return optimizer

    votes, averages = made("vote"), made("average")
    with pytest.raises(ValueError, match="no momentum of shape .* for parameter 0"):
        votes.load_state_dict(averages.state_dict())
    with pytest.raises(ValueError, match="no eps in a param group"):
        averages.load_state_dict(votes.state_dict())
    again = made("average")
    again.load_state_dict(averages.state_dict())
    for parameter, other in zip(again.state.values(), averages.state.values(), strict=True):
        assert all(torch.equal(parameter[name], other[name]) for name in other)


@pytest.mark.parametrize("local_steps", [False, True])
@pytest.mark.parametrize("written", ["vote", "average"])
def test_checkpoints_of_the_other_kind_are_refused(written: str, local_steps: bool, tmp_path: Path) -> None:
    def made(rest: str) -> Any:
        inner = DistributedMuon(groups_of(parameters()), rest=rest, **SETTINGS)
        return LocalSteps(inner, every=2) if local_steps else inner

    here = made("average" if written == "vote" else "vote")
    optimizer = made(written)
    for given in (optimizer, here):
        for parameter in (p for group in given.param_groups for p in group["params"]):
            parameter.grad = torch.ones_like(parameter)
        given.step()
    save_workers(tmp_path, optimizer)
    before = copy.deepcopy(here.state_dict())
    with pytest.raises(
        CheckpointError, match=r"written by .*DistributedMuon.*, whose state is not that of .*DistributedMuon"
    ) as caught:
        load_workers(tmp_path, here)
    assert "(rest='average')" in str(caught.value)
    assert str(before) == str(here.state_dict())


def test_nothing_to_average_is_as_votes() -> None:
    for rest in ("vote", "average"):
        hidden = DistributedMuon([{"params": [torch.nn.Parameter(torch.ones(8, 8))], "orthogonal": True}], rest=rest)
        assert hidden.method == "DistributedMuon"
        hidden.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))]})
        assert hidden.method == ("DistributedMuon" if rest == "vote" else "DistributedMuon(rest='average')")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rest": "mean"}, "rest='mean' is not known; it is one of 'vote', 'average'"),
        ({"rest": "average", "eps": -1.0}, "eps=-1.0"),
        ({"eps": 1e-3}, "eps=0.001 with rest='vote'"),
        ({"rest": "average", "betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedMuon(groups_of(parameters()), **options)
