"""Models that are frozen, resized, converted or copied between two steps."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hf_dlion import DistributedLion
from hf_dlion.optim.glion import GlobalLion
from hf_dlion.optim.virtual import VirtualWorkers
from tests.harness import run_workers
from tests.optim.test_methods import CASES, OPTIONS, gradients, groups, optimizer, parameters

Absent = Callable[[int], list[int]]

FROZEN = [0, 2, 4]  # a vector, a matrix that dmuon orthogonalises, one that it does not


def workers_of(name: str, params: list[nn.Parameter], workers: int) -> Any:
    if workers == 1:
        return optimizer(name, params)
    method = CASES[name]
    options = method.fixed | OPTIONS.get(name, {})
    return VirtualWorkers(groups(name, params), workers, method.optimizer, lr=1e-2, weight_decay=0.1, **options)


def step(
    chosen: Any, params: list[nn.Parameter], number: int, workers: int, absent: Callable[[int], list[int]]
) -> None:
    """One step; of worker r the parameters in ``absent(r)`` have no gradient."""
    for rank in range(workers):
        for index, (parameter, gradient) in enumerate(zip(params, gradients(rank, number), strict=True)):
            parameter.grad = None if index in absent(rank) else gradient
        if workers > 1:
            chosen.next_worker()
    chosen.step()


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_what_nobody_has_a_gradient_for_is_left_alone(name: str, workers: int) -> None:
    params = parameters()
    chosen = workers_of(name, params, workers)
    step(chosen, params, 0, workers, lambda rank: [])
    member = getattr(chosen, "members", [chosen])[0]
    before = [parameter.detach().clone() for parameter in params]
    states = [{key: value.clone() for key, value in member.state[parameter].items()} for parameter in params]
    for number in (1, 2, 3):
        step(chosen, params, number, workers, lambda rank: FROZEN)
    for index, (parameter, was) in enumerate(zip(params, before, strict=True)):
        assert torch.equal(parameter, was) == (index in FROZEN or not parameter.numel()), f"parameter {index}"
        if index in FROZEN:
            assert all(torch.equal(member.state[parameter][key], value) for key, value in states[index].items())
    step(chosen, params, 4, workers, lambda rank: [])
    assert not any(torch.equal(params[index], before[index]) for index in FROZEN)


@pytest.mark.parametrize("name", CASES)
def test_what_one_worker_has_a_gradient_for_is_updated(name: str) -> None:
    params = parameters()
    chosen = workers_of(name, params, 3)
    step(chosen, params, 0, 3, lambda rank: [])
    before = [parameter.detach().clone() for parameter in params]
    step(chosen, params, 1, 3, lambda rank: [] if rank == 1 else FROZEN)
    assert not any(torch.equal(params[index], before[index]) for index in FROZEN)


def frozen_in_turns(rank: int) -> list[torch.Tensor]:
    """Which parameters nobody has a gradient for changes; over processes."""
    held = []
    for name in ("dlion_mavo", "dmuon_mavo", "glion", "dgc"):
        params = parameters()
        chosen = optimizer(name, params)
        for number in range(4):
            for index, (parameter, gradient) in enumerate(zip(params, gradients(rank, number), strict=True)):
                parameter.grad = None if index in absent_in_turns(number)(rank) else gradient
            chosen.step()
        held += [parameter.detach() for parameter in params]
    return held


def absent_in_turns(number: int) -> Absent:
    return lambda rank: [number] if number < 3 else [rank]


def test_processes_leave_alone_what_virtual_workers_do() -> None:
    want = []
    for name in ("dlion_mavo", "dmuon_mavo", "glion", "dgc"):
        params = parameters()
        chosen = workers_of(name, params, 3)
        for number in range(4):
            step(chosen, params, number, 3, absent_in_turns(number))
        want += params
    for held in run_workers(frozen_in_turns, 3):
        assert all(map(torch.equal, held, want))


def conv() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, 3)


def conv_step(chosen: Any, model: nn.Module, number: int, workers: int) -> None:
    for rank in range(workers):
        generator = torch.Generator().manual_seed(10 * number + rank)
        for parameter in model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        if workers > 1:
            chosen.next_worker()
    chosen.step()


CONVERSIONS: dict[str, Callable[[nn.Module], Any]] = {
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "bfloat16": lambda model: model.bfloat16(),
    "data replaced": lambda model: setattr(model.weight, "data", model.weight.data.clone()),
}


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("method", [DistributedLion, GlobalLion])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_conversion_is_followed(conversion: str, method: Any, workers: int) -> None:
    def made(model: nn.Module) -> Any:
        params = model.named_parameters()
        return method(params, lr=1e-2) if workers == 1 else VirtualWorkers(params, workers, method, lr=1e-2)

    model = conv()
    chosen = made(model)
    for number in range(2):
        conv_step(chosen, model, number, workers)
    state = copy.deepcopy(chosen.state_dict())
    CONVERSIONS[conversion](model)
    other = copy.deepcopy(model)
    anew = made(other)
    anew.load_state_dict(state)
    for number in range(2, 4):
        conv_step(chosen, model, number, workers)
        conv_step(anew, other, number, workers)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def convert_between_steps(rank: int) -> list[str]:
    """What all ranks say of a change on all, which is followed or refused, and of one on rank 1 alone."""
    said = []
    for method in (DistributedLion, GlobalLion):
        for everywhere in (True, False):
            for change in (
                lambda model: model.bfloat16(),
                lambda model: model.to(memory_format=torch.channels_last),
                lambda model: model.double(),
                lambda model: setattr(model.bias, "data", torch.zeros(9)),
            ):
                model = conv()
                chosen = method(model.named_parameters(), lr=1e-2)
                for number in range(3):
                    if number == 1 and (everywhere or rank == 1):
                        model.zero_grad()
                        change(model)
                    for parameter in model.parameters():
                        parameter.grad = torch.full_like(parameter, 1.0 + rank)
                    try:
                        chosen.step()
                    except (RuntimeError, ValueError) as error:
                        said.append(f"{type(error).__name__}: {error}")
                        break
                else:
                    said.append(f"{float(model.weight.sum()):.6f}")
    return said


def test_a_change_on_all_ranks_is_followed_and_on_one_refused_by_all() -> None:
    first, second = run_workers(convert_between_steps, 2)
    for ours, theirs, i in zip(first, second, range(16), strict=True):
        if i % 8 in (0, 1):
            assert ours == theirs
            assert "Error" not in ours
            continue
        expected = {2: "parameter 0 (weight) has dtype torch.float64", 3: "parameter 1 (bias) has shape (9,)"}
        alone = "RuntimeError: a parameter was changed on some ranks only: parameter "
        for message in (ours, theirs):
            assert expected.get(i % 8, alone) in message


def resized(rank: int, before: bool) -> tuple[str, int]:
    torch.manual_seed(0)
    embedding = nn.Embedding(8, 4)
    chosen = DistributedLion(embedding.named_parameters(), lr=1e-2)
    if before:
        embedding(torch.arange(8)).pow(2).sum().mul(rank + 1).backward()
        chosen.step()
    embedding.weight.data = torch.cat([embedding.weight.data, torch.ones(2, 4)])  # as resize_token_embeddings
    embedding.weight.grad = None
    embedding(torch.arange(10)).pow(2).sum().mul(rank + 1).backward()
    try:
        chosen.step()
    except ValueError as error:
        return str(error), 0
    return "", int((embedding.weight[8:] != 1).sum())


@pytest.mark.parametrize("before", [False, True])
def test_a_resized_embedding(before: bool) -> None:
    for error, moved in run_workers(resized, 2, before):
        assert moved == (0 if before else 8)
        assert error.startswith("parameter 0 (weight) has shape (10, 4), and its momentum (8, 4)") == before


def take_out(rank: int) -> list[str]:
    """What ranks say of parameters that are taken out of the optimizer on all ranks or on rank 1 alone."""
    said = []
    for name in ("dlion_mavo", "dmuon_mavo", "gadamw", "dgc"):
        for everywhere in (True, False):
            for change in (
                lambda groups: groups[-1]["params"].pop(0),
                lambda groups: groups.pop(0) if len(groups) > 1 else groups[0]["params"].pop(),
            ):
                params = parameters()
                chosen = optimizer(name, params)
                for number in range(3):
                    if number == 1 and (everywhere or rank == 1):
                        change(chosen.param_groups)
                    for parameter, gradient in zip(params, gradients(rank, number), strict=True):
                        parameter.grad = gradient
                    try:
                        chosen.step()
                    except RuntimeError as error:
                        said.append(str(error))
                        break
                else:
                    said.append(str([float(parameter.sum()) for parameter in params]))
    return said


def test_parameters_may_be_taken_out_on_all_ranks_and_not_on_one() -> None:
    first, second = run_workers(take_out, 2)
    assert first == second
    for i, said in enumerate(first):
        assert said.startswith("[" if i % 4 < 2 else "a parameter was changed on some ranks only: "), said


@pytest.mark.parametrize("name", CASES)
def test_virtual_workers_follow_values_that_were_set(name: str) -> None:
    params = parameters()
    chosen = workers_of(name, params, 2)
    for member in chosen.members:
        member.agreement.check_replicas_steps = 1
    kept = [parameter.detach().clone() for parameter in params]
    for number in range(4):
        step(chosen, params, number, 2, lambda rank: [])
        if number == 1:  # as load_state_dict of a model does
            for parameter, value in zip(params, kept, strict=True):
                parameter.data.copy_(value)


def test_virtual_workers_whose_groups_shrank_are_refused() -> None:
    params = parameters()
    chosen = workers_of("dlion_mavo", params, 2)
    chosen.param_groups[0]["params"].pop()
    with pytest.raises(ValueError, match=r"had \[\d+\]: .* Freeze them instead"):
        step(chosen, params, 0, 2, lambda rank: [])


def test_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.float64.*model.float\(\)"):
        DistributedLion([nn.Parameter(torch.ones(3, dtype=torch.float64))])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_a_copy_goes_on_as_the_original(name: str, workers: int, copied: Callable[[Any], Any]) -> None:
    params = parameters()
    chosen = workers_of(name, params, workers)
    chosen.register_step_post_hook(lambda *_: None)  # torch's optimizers do not copy hooks either
    torch.optim.lr_scheduler.LambdaLR(chosen, lambda _: 1.0)  # puts another step() on it, which is not copied either
    step(chosen, params, 0, workers, lambda rank: [])
    others, other = copied((params, chosen))
    for number in (1, 2):
        step(chosen, params, number, workers, lambda rank: [])
        step(other, others, number, workers, lambda rank: [])
    assert all(map(torch.equal, params, others))
    assert chosen.ledger.steps == other.ledger.steps


def test_the_state_of_another_worker_is_loaded_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    chosen = workers_of("dlion_mavo", params, 3)
    step(chosen, params, 0, 3, lambda rank: [])
    first, second, _ = chosen.members
    second.load_state_dict(second.state_dict())
    assert not caplog.records
    second.load_state_dict(first.state_dict())
    assert "worker 1 of 3 has loaded the momentum of worker 0" in caplog.text
    assert "worker" not in second.param_groups[0]
    assert second.state_dict()["param_groups"][0]["worker"] == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_hooks_are_called_as_by_torch(workers: int) -> None:
    called: list[str] = []

    def note(name: str, result: Any = None) -> Callable[..., Any]:
        return lambda *_: called.append(name) or result

    params = parameters()
    chosen = workers_of("dlion_mavo", params, workers)
    step(chosen, params, 0, workers, lambda rank: [])
    kept = copy.deepcopy(chosen.state_dict())
    step(chosen, params, 1, workers, lambda rank: [])
    chosen.register_step_pre_hook(note("before a step"))
    chosen.register_step_post_hook(note("after a step"))
    chosen.register_state_dict_pre_hook(note("before saving"))
    chosen.register_state_dict_post_hook(note("after saving", {"of the hook": True}))
    chosen.register_load_state_dict_pre_hook(note("before loading", kept))
    chosen.register_load_state_dict_post_hook(note("after loading"))
    assert chosen.state_dict() == {"of the hook": True}
    chosen.load_state_dict({"state": {}, "param_groups": []})  # the hook gives another
    step(chosen, params, 2, workers, lambda rank: [])
    expected = ["before saving", "after saving", "before loading", "after loading", "before a step", "after a step"]
    assert list(dict.fromkeys(called)) == expected
    again = parameters()
    other = workers_of("dlion_mavo", again, workers)
    step(other, again, 0, workers, lambda rank: [])
    member, reference = (getattr(one, "members", [one])[0] for one in (chosen, other))
    step(other, again, 2, workers, lambda rank: [])
    for mine, theirs in zip(params, again, strict=True):
        assert torch.equal(member.state[mine]["momentum"], reference.state[theirs]["momentum"])
