"""Local steps with bad gradients, overflows, and wrong use."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_dlion import DistributedLion, load_workers, save_workers
from hf_dlion.optim.local_steps import LocalSteps
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.wire.exchange import TIES
from tests.harness import run_workers
from tests.optim.test_local_steps import adamw, give, one, received, sgd, step_once
from tests.optim.test_methods import parameters
from tests.reference import ReferenceLocalSteps

BAD = {1: [1], 4: [2], 5: [2], 6: [2], 7: [2], 9: [0, 1], 10: [0]}
"""By step, the workers with a NaN in a gradient: worker 2 in all steps of the second round."""


def test_bad_steps_are_left_out_and_a_worker_without_another_abstains(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = VirtualWorkers(params, 3, lambda given, **keywords: LocalSteps(adamw(given), every=4, **keywords))
    plain = ReferenceLocalSteps(parameters(), 3, adamw, every=100)
    for step in range(12):
        bad = BAD.get(step, [])
        for rank in range(3):
            give(params, received(rank, step))
            if rank in bad:
                params[2].grad = torch.full_like(params[2], torch.nan)
            optimizer.next_worker()
        optimizer.step()
        plain.step([None if rank in bad else received(rank, step) for rank in range(3)])
        if step % 4 == 3:
            plain.every = 4
            plain.vote([2] if step == 7 else [])
            plain.every = 100
        for member, own in zip(optimizer.members, plain.own, strict=True):
            assert all(map(torch.equal, (p for group in member.param_groups for p in group["params"]), own)), step
    assert optimizer.bad_gradients == 1
    assert "worker 1 abstains from a step: the gradient of parameter 2" in caplog.text


def test_a_displacement_that_is_not_finite_makes_its_worker_abstain() -> None:
    parameter, optimizer = one(3, 2)
    step_once(parameter, optimizer, [1.0, 1.0, 3e38])
    step_once(parameter, optimizer, [1.0, 3.0, 3e38])
    torch.testing.assert_close(parameter.detach(), torch.full((300,), -0.7 * 3.0))
    assert optimizer.bad_gradients == 1


def test_raises_at_the_next_vote_where_that_is_wanted_or_nobody_is_left() -> None:
    parameter, optimizer = one(2, 2, on_bad_gradient="raise")
    step_once(parameter, optimizer, [1.0, torch.inf])
    with pytest.raises(FloatingPointError, match=r"rank 1: the gradient of parameter 0 \(weight\)"):
        step_once(parameter, optimizer, [1.0, 1.0])
    assert not parameter.any()  # x_0
    step_once(parameter, optimizer, [1.0, 1.0])
    step_once(parameter, optimizer, [1.0, 1.0])
    torch.testing.assert_close(parameter.detach(), torch.full((300,), -1.4))
    parameter, optimizer = one(2, 1)
    with pytest.raises(FloatingPointError, match="rank 0: the gradient of parameter 0"):
        step_once(parameter, optimizer, [torch.nan, torch.nan])


def scaled(rank: int) -> tuple[list[float], list[float], int]:
    """All overflow at first, and rank 1 at step 3; votes are at steps 1, 3, 5."""
    parameter = nn.Parameter(torch.zeros(300))
    optimizer = LocalSteps(torch.optim.SGD([parameter], lr=1.0), every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    history, scales = [], []
    for step in range(6):
        bad = step < 2 or (step, rank) == (3, 1)
        parameter.grad = torch.full_like(parameter, torch.inf if bad else (1.0 + 2 * rank) * scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        history.append(parameter[0].item())
        scales.append(scaler.get_scale())
    return history, scales, optimizer.bad_gradients


def test_with_a_gradient_scaler_who_overflows_leaves_a_step_out() -> None:
    first, second = run_workers(scaled, 2)
    # Rank 0 moves by 1 a step, rank 1 by 3; the mean magnitude is that of 2 and 3, then of 2 and 6.
    assert first == ([0.0, 0.0, -1.0, -2.5, -3.5, -6.5], [2.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2)
    assert second == ([0.0, 0.0, -3.0, -2.5, -5.5, -6.5], [2.0, 1.0, 1.0, 0.5, 0.5, 0.5], 2)


# What does not fit together


def wrong_use(rank: int, case: str) -> str:
    parameter = nn.Parameter(torch.ones(300) * (1 + rank * (case == "parameters")))
    kind: Any = torch.optim.SGD if rank and case == "inner" else torch.optim.AdamW
    if case == "inner option":
        kind = partial(DistributedLion, norm_gradients=rank == 1, tie=TIES[rank])  # ties are nothing to one alone
    options: dict[str, Any] = {"every": 3 + rank * (case == "every"), "outer_lr": 0.5 + rank * (case == "outer_lr")}
    optimizer = LocalSteps(kind([parameter], lr=0.1), **options)
    for step in range(3):
        parameter.grad = torch.full_like(parameter, 1.0 if case == "gradients" else 1.0 + rank)
        if case == "lr" and step == 2:
            optimizer.param_groups[0]["lr"] = 0.2 + rank
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"{step}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("parameters", "0: the parameters differ between the ranks before the first step"),
        ("gradients", "0: all 2 workers have exactly the same gradients"),
        ("inner", "0: the ranks do not optimize the same parameters in the same way: method is LocalSteps(AdamW) on"),
        (
            "inner option",
            "0: the ranks do not optimize the same parameters in the same way: norm_gradients is absent on rank 0 and",
        ),
        ("every", "0: the ranks do not optimize the same parameters in the same way: every is 3 on rank 0 and 4 on"),
        ("outer_lr", "2: the ranks have different hyperparameters: outer_lr of param group 0 is 0.5 on rank 0 and 1.5"),
        ("lr", "2: the ranks have different hyperparameters: lr of param group 0 is 0.2 on rank 0 and 1.2 on rank 1"),
    ],
)
def test_all_ranks_say_what_does_not_fit(case: str, message: str) -> None:
    for said in run_workers(wrong_use, 2, case):
        assert said.startswith(message)


def drifting(rank: int) -> str:
    parameter = nn.Parameter(torch.zeros(300))
    optimizer = LocalSteps(torch.optim.SGD([parameter], lr=0.1), every=2, check_replicas_steps=3)
    for step in range(8):
        if step == 2 and rank == 1:
            parameter.data[7] += 1  # between two rounds
        parameter.grad = torch.full_like(parameter, 1.0 + rank)
        try:
            optimizer.step()
        except RuntimeError as error:
            return f"{step}: {error}"
    return "no error"


def test_replicas_that_drift_apart_are_found() -> None:
    for said in run_workers(drifting, 2):
        assert said.startswith("3: the parameters are no longer the same on all ranks at step 4")


class WithModes(torch.optim.SGD):
    def train(self) -> None:
        pass


def test_inner_optimizers_that_are_refused() -> None:
    params = [nn.Parameter(torch.zeros(3))]
    with pytest.raises(ValueError, match="LocalSteps around a VirtualWorkers: .*VirtualWorkers\\(params, N, method\\)"):
        LocalSteps(VirtualWorkers(params, 2, DistributedLion), every=2)
    with pytest.raises(ValueError, match="LocalSteps around a LocalSteps: its inner optimizer"):
        LocalSteps(LocalSteps(sgd(params), every=2), every=2)
    with pytest.raises(TypeError, match="LocalSteps takes an optimizer, .* not a generator"):
        LocalSteps((param for param in params), every=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LocalSteps around a WithModes: its parameters are others for training"):
        LocalSteps(WithModes(params), every=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every=0: it is a number of steps"),
        ({"every": 2.5}, "every=2.5"),
        ({"fragments": 3}, "fragments=3: it is a number from 1 to every, 2"),
        ({"fragments": 2, "delay": 2}, "delay=2: it is a number of steps from 0 to every // fragments, 1"),
        ({"outer_lr": -1.0}, "outer_lr=-1.0: it cannot be negative"),
        ({"outer_momentum": 1.0}, "outer_momentum=1.0"),
        ({"aggregation": "median"}, "aggregation='median'.*'mean'"),
        ({"tie": "coin"}, "tie='coin'"),
        ({"exchange": "mail"}, "exchange='mail'"),
        ({"check_replicas_steps": -1}, "check_replicas_steps=-1"),
        ({"on_bad_gradient": "ignore"}, "on_bad_gradient='ignore'"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalSteps(sgd([nn.Parameter(torch.zeros(3))]), **{"every": 2, **options})


def streamed(workers: int = 2, **options: Any) -> tuple[list[nn.Parameter], Any]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(300)) for _ in range(2)]
    options = {"every": 4, "fragments": 2, "delay": 2} | options
    made = VirtualWorkers(parameters, workers, lambda given, **more: LocalSteps(sgd(given), **options, **more))
    return parameters, made


def steps(parameters: list[nn.Parameter], optimizer: Any, numbers: range) -> None:
    for step in numbers:
        for rank in range(2):
            source = torch.Generator().manual_seed(100 * step + rank)
            for parameter in parameters:
                parameter.grad = torch.randn(300, generator=source)
            optimizer.next_worker()
        optimizer.step()


def test_loading_forgets_the_vote_that_is_on_its_way(tmp_path: Path) -> None:
    """One part's is on its way where another part's was when it was saved."""
    ours, optimizer = streamed(outer_momentum=0.5)
    steps(ours, optimizer, range(5))
    save_workers(tmp_path, optimizer)
    steps(ours, optimizer, range(5, 7))
    theirs, fresh = streamed(outer_momentum=0.5)
    for mine, one_of_both in ((ours, optimizer), (theirs, fresh)):
        load_workers(tmp_path, one_of_both)
        steps(mine, one_of_both, range(5, 12))
        one_of_both.vote()
    assert all(map(torch.equal, ours, theirs))


def test_what_is_saved_after_sending_has_failed_is_defined(tmp_path: Path) -> None:
    parameters, optimizer = streamed(fragments=1)
    steps(parameters, optimizer, range(3))
    for member in optimizer.members:
        with torch.no_grad():
            member.param_groups[0]["params"][0][0] = torch.inf
    with pytest.raises(FloatingPointError):
        steps(parameters, optimizer, range(3, 4))
    save_workers(tmp_path, optimizer)
    for member in optimizer.members:
        assert all(torch.equal(sent, member.param_groups[0]["params"][i]) for i, sent in member._sent.items())


def test_a_group_is_added_while_a_vote_is_on_its_way() -> None:
    """What was voted on is x_0 of all, and moves by what was decided once, as without the group."""
    found = []
    for adds in (False, True):
        parameters, optimizer = streamed()
        steps(parameters, optimizer, range(5))
        if adds:
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(900))]})
        steps(parameters, optimizer, range(5, 6))
        found.append([optimizer.members[0].state[parameter]["anchor"].clone() for parameter in parameters])
    assert all(map(torch.equal, *found))
