"""Workers with a bad gradient are left out of a step; with a gradient scaler, those that overflowed."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.nn.utils import get_total_norm

from hf_dlion import DistributedLion
from hf_dlion.optim import agreement, bad_gradients
from hf_dlion.optim.bad_gradients import first_bad_gradient, verdict_on
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.methods import METHODS
from tests.harness import run_workers
from tests.kernels import use_kernels
from tests.optim import test_dlion as dense
from tests.optim.test_methods import DECAY, LR, OPTIONS, STEPS, gradients, groups, parameters
from tests.reference import ReferenceLion

BAD = {2: [0], 3: [1, 2], 5: [2], 7: [0, 1]}
"""By step, the ranks whose gradient is bad."""


def spoil(given: list[torch.Tensor], value: float) -> list[torch.Tensor]:
    given[1] = given[1].clone()
    given[1].view(-1)[-1] = value
    return given


def follow_reference(rank: int, workers: int, kernels: str) -> None:
    use_kernels(kernels)
    for aggregation, tie, exchange in itertools.product(("mavo", "avg"), ("zero", "alternate"), ("gather", "sharded")):
        mine = dense.parameters(torch.float32)
        options = {"aggregation": aggregation, "tie": tie}
        optimizer = DistributedLion(mine, exchange=exchange, **options, **dense.SETTINGS)
        reference = ReferenceLion(
            dense.flatten(mine).clone(), workers, **dense.SETTINGS, **options, lanes=dense.lanes()
        )
        for step in range(10):
            bad = BAD.get(step, [])
            own = dense.gradients(rank, step, torch.float32)
            if rank in bad:
                spoil(own, torch.nan if rank else torch.inf)
            for parameter, gradient in zip(mine, own, strict=True):
                parameter.grad = gradient
            optimizer.step()
            theirs = [dense.flatten(dense.gradients(other, step, torch.float32)) for other in range(workers)]
            reference.step([None if other in bad else theirs[other] for other in range(workers)])
            assert torch.equal(dense.flatten(mine), reference.parameters), (aggregation, tie, exchange, step)
            momenta = dense.flatten([optimizer.state[parameter]["momentum"] for parameter in mine])
            assert torch.equal(momenta, reference.momenta[rank]), (aggregation, tie, exchange, step)
        assert optimizer.abstentions == sum(map(len, BAD.values()))


@pytest.mark.parametrize("workers", [3, 4])
def test_votes_without_the_bad_ones(workers: int) -> None:
    run_workers(follow_reference, workers, workers, "native" if workers % 2 else "eager")


@pytest.mark.parametrize("name", METHODS)
def test_a_worker_that_always_abstains_is_as_if_it_were_not(name: str) -> None:
    options = {"lr": LR, "weight_decay": DECAY, **METHODS[name].fixed, **OPTIONS.get(name, {})}
    if name == "dgc":
        options["clip"] = 0.0  # else the number of workers stands in it
    fewer, all_three = parameters(), parameters()
    two = VirtualWorkers(groups(name, fewer), 2, METHODS[name].optimizer, **options)
    three = VirtualWorkers(groups(name, all_three), 3, METHODS[name].optimizer, **options)
    three.members[2].make_state()
    kept = [{key: tensor.clone() for key, tensor in state.items()} for state in three.members[2].state.values()]
    local = {"momentum"} if isinstance(three.members[0], DistributedLion) else {"residual", "velocity"}
    for step in range(STEPS):
        for optimizer, params in ((two, fewer), (three, all_three)):
            for rank in range(optimizer.workers):
                own = gradients(rank, step)
                for parameter, gradient in zip(params, own if rank < 2 else spoil(own, torch.nan), strict=True):
                    parameter.grad = gradient
                optimizer.next_worker()
            optimizer.step()
        assert all(map(torch.equal, fewer, all_three)), step
    for before, after in zip(kept, three.members[2].state.values(), strict=True):
        assert all(torch.equal(before[key], after[key]) for key in local & before.keys())
    assert three.abstentions == STEPS


@pytest.mark.parametrize("name", METHODS)
def test_a_worker_that_abstains_once_keeps_what_is_its_own(name: str) -> None:
    params = parameters()
    options = {"lr": LR, "weight_decay": DECAY, **METHODS[name].fixed, **OPTIONS.get(name, {})}
    optimizer = VirtualWorkers(groups(name, params), 3, METHODS[name].optimizer, **options)
    kept: list[dict[str, torch.Tensor]] = []
    for step in range(3):
        if step == 2:
            member = optimizer.members[2]
            local = member.local_state_names
            kept = [{key: state[key].clone() for key in local} for state in member.state.values()]
        for rank in range(3):
            own = gradients(rank, step)
            for parameter, gradient in zip(params, spoil(own, torch.nan) if rank == step == 2 else own, strict=True):
                parameter.grad = gradient
            optimizer.next_worker()
        optimizer.step()
    for before, state in zip(kept, optimizer.members[2].state.values(), strict=True):
        assert all(torch.equal(before[key], state[key]) for key in before)
    assert any(state[key].any() for state in optimizer.members[2].state.values() for key in kept[0]) or not kept[0]


def scaled(rank: int) -> tuple[list[torch.Tensor], list[float], list[int]]:
    """Rank 1 overflows at step 2, and all at step 4; the last steps go through accelerate."""
    mine = dense.parameters(torch.float32)
    optimizer = DistributedLion(mine, **dense.SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # of a loss: it starts the scaler
    Accelerator(cpu=True)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    history, scales = [], []
    for step in range(8):
        own = dense.gradients(rank, step, torch.float32)
        if (step, rank) == (2, 1) or step == 4:
            spoil(own, torch.inf)
        for parameter, gradient in zip(mine, own, strict=True):
            parameter.grad = gradient * scaler.get_scale()
        if step == 6:
            scaler.unscale_(optimizer)
        if step < 5:
            scaler.step(optimizer)
            scaler.update()
        else:
            wrapped.step()
            assert not wrapped.step_was_skipped
        history.append(dense.flatten(mine).clone())
        scales.append(scaler.get_scale())
    return history, scales, [optimizer.abstentions, optimizer.param_groups[0]["step"]]


def test_with_a_gradient_scaler_who_overflows_abstains() -> None:
    outcomes = run_workers(scaled, 3)
    reference = ReferenceLion(
        dense.flatten(dense.parameters(torch.float32)), 3, **dense.SETTINGS, aggregation="mavo", tie="zero",
        lanes=dense.lanes(),
    )  # fmt: skip
    for step in range(8):
        if step == 4:
            reference.steps += 1
        else:
            theirs = [dense.flatten(dense.gradients(other, step, torch.float32)) for other in range(3)]
            reference.step([None if (step, other) == (2, 1) else theirs[other] for other in range(3)])
        for history, _, _ in outcomes:
            assert torch.equal(history[step], reference.parameters), step
    for rank, (_, scales, counts) in enumerate(outcomes):
        assert scales == [1024.0] * 2 + [512.0 if rank == 1 else 1024.0] * 2 + [256.0 if rank == 1 else 512.0] * 4
        assert counts == [4, 8]


def clipped_by_value(rank: int) -> tuple[torch.Tensor, int]:
    """Rank 1 overflows, and is clipped to what is finite."""
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = DistributedLion([parameter], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    parameter.grad = torch.linspace(-1 - rank, 2, 8)
    if rank == 1:
        parameter.grad[:] = torch.inf
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_value_([parameter], 1.0)
    scaler.step(optimizer)
    return parameter.detach(), optimizer.abstentions


def test_who_overflowed_abstains_though_it_was_clipped() -> None:
    for parameter, abstentions in run_workers(clipped_by_value, 3):
        assert abstentions == 1
        # Of three voters there would be no ties.
        assert sorted(parameter.unique().tolist()) == pytest.approx([0.9, 1.0, 1.1])


def always_bad(rank: int) -> str:
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = DistributedLion([("weight", parameter)], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(torch.zeros(()))
    for step in range(100):
        parameter.grad = torch.linspace(-1 - rank, 2, 8)
        if step != 20 or rank != 0:
            parameter.grad[3] = torch.nan
        try:
            scaler.step(optimizer)
        except FloatingPointError as error:
            return f"{step}: {error}"
        scaler.update()
    return "no error"


@pytest.mark.parametrize("workers", [1, 2])
def test_what_no_scale_explains_is_an_error(workers: int) -> None:
    for message in run_workers(always_bad, workers):
        assert message.startswith(
            "60: all workers overflowed in 40 steps in a row; rank 0: the gradient of parameter 0 (w"
        )


def test_a_single_worker_with_a_gradient_scaler_skips() -> None:
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = DistributedLion([parameter], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    for gradient in (torch.inf, 1.0):
        parameter.grad = torch.full((8,), gradient)
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(parameter.detach(), torch.ones(8) if gradient == torch.inf else torch.zeros(8))
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("name", ["dlion_mavo", "gadamw"])
def test_raises_where_that_is_wanted_or_nobody_is_left(name: str, caplog: Any) -> None:
    def step(bad: list[int], on_bad_gradient: str) -> torch.Tensor:
        parameter = torch.nn.Parameter(torch.zeros(4))
        named = [("weight", parameter)]
        optimizer = VirtualWorkers(
            named, 3, METHODS[name].optimizer, on_bad_gradient=on_bad_gradient, **METHODS[name].fixed
        )
        for rank in range(3):
            parameter.grad = torch.full((4,), torch.nan if rank in bad else 1.0 + rank)
            optimizer.next_worker()
        optimizer.step()
        return parameter.detach()

    with pytest.raises(FloatingPointError, match=r"rank 1: the gradient of parameter 0 \(weight\).* at step 0"):
        step([1], "raise")
    with pytest.raises(FloatingPointError, match="rank 0"):
        step([0, 1, 2], "abstain")
    with caplog.at_level(logging.WARNING):
        assert (step([1, 2], "abstain") < 0).all()
    assert "worker 1 abstains" in caplog.text
    with pytest.raises(ValueError, match=r"on_bad_gradient='ignore'.*'abstain', 'raise'"):
        step([], "ignore")


@pytest.mark.parametrize(("bad", "first"), [((), -1), ((4,), 4), ((1, 4), 1), ((0, 1), 0)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("native_from", [0, 1 << 62])
def test_the_verdict_of_a_gpu_is_that_of_a_cpu(
    native_from: int, bad: tuple[int, ...], first: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_gradients, "NATIVE_FROM", native_from)
    large = torch.full((9,), 3e38)  # whose sum is not finite
    gradients: list[Any] = [torch.ones(5), torch.ones(3, 4, dtype=torch.bfloat16), None, torch.ones(0), large]
    for index in bad:
        gradients[index].view(-1)[-1] = value
    assert first_bad_gradient(gradients) == first
    assert verdict_on(gradients, torch.device("cpu")).tolist() == [first]


def looked_at(optimizer: DistributedLion, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many gradients the next step looks at to find those that are not finite."""
    counts: list[int] = []

    def count(gradients: Any) -> int:
        counts.append(sum(gradient is not None for gradient in gradients))
        return first_bad_gradient(gradients)

    monkeypatch.setattr(agreement, "first_bad_gradient", count)
    optimizer.step()
    return counts


def test_gradients_of_which_the_norm_is_known_are_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = [torch.nn.Parameter(torch.ones(8)) for _ in range(3)]
    optimizer = DistributedLion(mine, lr=0.1)

    def give_gradients() -> list[torch.Tensor]:
        given = [torch.ones(8) for _ in mine]
        for parameter, gradient in zip(mine, given, strict=True):
            parameter.grad = gradient
        return given

    given = give_gradients()
    optimizer.agreement.known_finite.note_norm(given, get_total_norm(given))
    assert looked_at(optimizer, monkeypatch) == [0]
    assert looked_at(optimizer, monkeypatch) == [3], "for one step"
    optimizer.agreement.known_finite.note_norm(given, get_total_norm(given))
    mine[1].grad = torch.ones(8)
    given[2].mul_(2)
    assert looked_at(optimizer, monkeypatch) == [2]
    given[0][3] = torch.nan
    norm = get_total_norm(given)
    optimizer.agreement.known_finite.note_norm(given, norm)
    norm.fill_(1.0)
    with pytest.raises(FloatingPointError, match=r"parameter 0"):
        optimizer.step()


def test_what_was_good_is_looked_at_once_its_scale_is_taken_off() -> None:
    parameter = torch.nn.Parameter(torch.ones(8))
    optimizer = DistributedLion([parameter], lr=0.1)
    parameter.grad = torch.full((8,), 1e10)
    optimizer.agreement.known_finite.good = range(1)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1e-35), torch.zeros(1)  # as a scaler leaves them
    optimizer.step()
    assert optimizer.agreement.known_finite.good == ()
    assert torch.equal(parameter.detach(), torch.ones(8))
    assert optimizer.state[parameter]["momentum"].isfinite().all()


def test_a_known_norm_keeps_no_gradient_alive_and_is_not_saved() -> None:
    parameter = torch.nn.Parameter(torch.ones(1000))
    optimizer = DistributedLion([parameter], lr=0.1)
    without = len(pickle.dumps(optimizer))
    parameter.grad = torch.ones(1000)
    optimizer.agreement.known_finite.note_norm([parameter.grad], torch.ones(()))
    assert len(pickle.dumps(optimizer)) < without + 4096
    copy.deepcopy(optimizer)
    kept = weakref.ref(parameter.grad)
    parameter.grad = None
    assert kept() is None
