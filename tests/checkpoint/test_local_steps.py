"""Checkpoints of local steps: each worker's parameters and inner state, exact, and for other numbers of workers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_dlion import LocalSteps, load_workers, save_workers
from hf_dlion.checkpoint.manifest import MANIFEST, CheckpointError, Manifest, entry_of
from hf_dlion.optim.virtual import VirtualWorkers
from tests.harness import run_workers
from tests.optim.test_local_steps import MOMENTUM, adamw, give, lion, received, sgd
from tests.optim.test_methods import parameters


class Counting(torch.optim.SGD):
    """Keeps a number, a word, nothing and a quantised state beside its momentum, as 8-bit optimizers do."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    state["count"] = state.get("count", 0) + 1
                    state["kind"], state["none"] = "counting", None
                    state["codes"] = (parameter.detach() * 100).to(torch.uint8)
                    parameter.data.add_(state["count"] * 1e-3)
        return None


def counting(params: Any, **_: Any) -> torch.optim.Optimizer:
    return Counting(params, lr=1e-2, momentum=0.9)


def method(inner: Callable[..., Any]) -> Callable[..., LocalSteps]:
    return lambda given, **keywords: LocalSteps(inner(given), **{"every": 4, **keywords})


def made(inner: Callable[..., Any], workers: int, **options: Any) -> tuple[list[nn.Parameter], Any]:
    params = parameters()
    if workers == 1:
        return params, method(inner)(params, **options)
    return params, VirtualWorkers(params, workers, method(inner), **options)


def go_on(params: list[nn.Parameter], optimizer: Any, steps: range, rank: int | None = None) -> list[Tensor]:
    for step in steps:
        for worker in range(optimizer.workers) if rank is None else [rank]:
            give(params, received(worker, step))
            if rank is None and optimizer.workers > 1:
                optimizer.next_worker()
        optimizer.step()
    return [parameter.detach().clone() for parameter in params]


def own_parameters(member: Any) -> list[Tensor]:
    return [parameter for group in member.param_groups for parameter in group["params"]]


@pytest.mark.parametrize("inner", [adamw, lion, sgd, counting])
@pytest.mark.parametrize("steps", [6, 8])
def test_goes_on_as_if_never_stopped(inner: Callable[..., Any], steps: int, tmp_path: Path) -> None:
    params, optimizer = made(inner, 3)
    go_on(params, optimizer, range(steps))
    save_workers(tmp_path, optimizer)
    names = load_file(tmp_path / "worker_00001_of_00003.safetensors").keys()
    assert ("1.parameter" in names) == ("1.anchor" in names) == (steps % 4 > 0)
    with optimizer.voted_parameters():
        voted = [parameter.detach().clone() for parameter in params]
    others, other = made(inner, 3)
    for parameter, x in zip(others, voted, strict=True):
        parameter.data.copy_(x)  # what the model's own file has
    load_workers(tmp_path, other)
    assert other.param_groups is other.members[0].inner.param_groups
    whole = go_on(params, optimizer, range(steps, 11))
    assert all(map(torch.equal, go_on(others, other, range(steps, 11)), whole))
    for one, another in zip(optimizer.members, other.members, strict=True):
        assert all(map(torch.equal, own_parameters(one), own_parameters(another)))


@pytest.mark.parametrize("steps", [6, 8])
@pytest.mark.parametrize(("before", "after"), [(MOMENTUM, {}), ({}, MOMENTUM)], ids=["with", "without"])
def test_a_run_keeps_its_outer_momentum(before: Any, after: Any, steps: int, tmp_path: Path) -> None:
    params, optimizer = made(adamw, 2, **before)
    go_on(params, optimizer, range(steps))
    save_workers(tmp_path, optimizer)
    assert ("0.momentum_buffer" in load_file(tmp_path / "worker_00000_of_00002.safetensors")) == bool(before)
    others, other = made(adamw, 2, **after)
    go_on(others, other, range(1))  # it has a state, or none for that
    with optimizer.voted_parameters():
        for parameter, x in zip(others, params, strict=True):
            parameter.data.copy_(x)
    load_workers(tmp_path, other)
    assert other.param_groups[0]["outer_momentum"] == before.get("outer_momentum", 0.0)
    whole = go_on(params, optimizer, range(steps, 13))
    assert all(map(torch.equal, go_on(others, other, range(steps, 13)), whole))


STREAMING = {"every": 6, "fragments": 3, "delay": 2}  # votes are sent after 2, 4 and 6 steps of a round


@pytest.mark.parametrize("steps", [2, 5, 9])
def test_goes_on_with_a_vote_on_its_way(steps: int, tmp_path: Path) -> None:
    params, optimizer = made(adamw, 3, **STREAMING)
    go_on(params, optimizer, range(steps))
    save_workers(tmp_path, optimizer)
    names = load_file(tmp_path / "worker_00001_of_00003.safetensors").keys()
    assert [name for name in names if name.endswith("sent")] == {2: ["0.sent", "1.sent"], 5: ["2.sent"]}.get(
        steps, ["0.sent", "1.sent"]
    )
    others, other = made(adamw, 3, **STREAMING)
    load_workers(tmp_path, other)
    whole = go_on(params, optimizer, range(steps, 13))
    assert all(map(torch.equal, go_on(others, other, range(steps, 13)), whole))
    optimizer.vote()
    other.vote()
    for one, another in zip(optimizer.members, other.members, strict=True):
        assert all(map(torch.equal, own_parameters(one), params))
        assert all(map(torch.equal, own_parameters(another), params))
    for policy in ("mean", "reset"):
        _, fewer = made(adamw, 2, **STREAMING)
        load_workers(tmp_path, fewer, resume_world_size_policy=policy)
        own = own_parameters(fewer.members[0])
        go_on(own, fewer, range(steps, 13))
        fewer.vote()
        assert all(map(torch.equal, own, own_parameters(fewer.members[1])))
        assert all(parameter.isfinite().all() for parameter in own)


def in_process(rank: int, folder: str, write: bool) -> list[Tensor]:
    params, optimizer = made(adamw, 1)
    if write:
        go_on(params, optimizer, range(6), rank)
        save_workers(folder, optimizer)
    else:
        load_workers(folder, optimizer)
    return go_on(params, optimizer, range(6, 11), rank)


def test_processes_and_virtual_workers_go_on_from_each_other(tmp_path: Path) -> None:
    whole = run_workers(in_process, 2, str(tmp_path), True)
    params, optimizer = made(adamw, 2)
    load_workers(tmp_path, optimizer)
    ours = go_on(params, optimizer, range(6, 11))
    for rank, again in enumerate(run_workers(in_process, 2, str(tmp_path), False)):
        assert all(map(torch.equal, again, whole[rank]))
        assert all(map(torch.equal, own_parameters(optimizer.members[rank]), whole[rank]))
    assert all(map(torch.equal, ours, whole[0]))


def mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


@pytest.mark.parametrize("inner", [adamw, counting])
def test_another_number_of_workers(inner: Callable[..., Any], tmp_path: Path) -> None:
    params, optimizer = made(inner, 3)
    go_on(params, optimizer, range(6))
    save_workers(tmp_path, optimizer)
    with optimizer.voted_parameters():
        voted = [parameter.detach().clone() for parameter in params]
    key = "exp_avg" if inner is adamw else "momentum_buffer"
    states = [[member.inner.state[p] for p in own_parameters(member)] for member in optimizer.members]
    for policy in ("mean", "reset"):
        _, other = made(inner, 2)
        load_workers(tmp_path, other, resume_world_size_policy=policy)
        for member in other.members:
            for index, parameter in enumerate(own_parameters(member)):
                theirs = [own_parameters(one)[index].detach() for one in optimizer.members]
                expected = mean(theirs) if policy == "mean" else voted[index]
                torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=1e-7)
                assert torch.equal(member.state[parameter]["anchor"], voted[index])
            if policy == "reset":
                assert not any(member.inner.state.values())
                continue
            found = member.inner.state[own_parameters(member)[2]][key]
            expected = mean([state[2][key] for state in states]) if inner is adamw else states[0][2][key]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
        assert other.members[0].between_votes
        go_on(own_parameters(other.members[0]), other, range(6, 8))
        assert not other.members[0].between_votes
        assert all(map(torch.equal, own_parameters(other.members[0]), own_parameters(other.members[1])))
    with pytest.raises(CheckpointError, match="is of 3 workers, and here are 2"):
        load_workers(tmp_path, made(inner, 2)[1], resume_world_size_policy="error")


def test_how_torch_computes_may_change(tmp_path: Path) -> None:
    """A newer transformers has another default for it; and the file may be gone."""

    def fused(params: Any, **_: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=1e-2, fused=True)

    params, optimizer = made(lambda given: torch.optim.AdamW(given, lr=1e-2), 1)
    go_on(params, optimizer, range(3))
    save_workers(tmp_path, optimizer)
    _, other = made(fused, 1)
    load_workers(tmp_path, other)
    for file in tmp_path.iterdir():
        file.write_bytes(b"")
    before, after = (one.inner.state_dict()["state"] for one in (optimizer, other))
    assert all(torch.equal(before[i]["exp_avg"], after[i]["exp_avg"]) for i in before)
    assert other.inner.param_groups[0]["fused"]


def test_another_inner_optimizer_is_refused(tmp_path: Path) -> None:
    params, optimizer = made(adamw, 2)
    go_on(params, optimizer, range(2))
    save_workers(tmp_path, optimizer)
    with pytest.raises(CheckpointError, match=r"by LocalSteps\(AdamW\), whose state is not that of LocalSteps\(SGD\)"):
        load_workers(tmp_path, made(sgd, 2)[1])
    with pytest.raises(ValueError, match="no state of an inner optimizer"):
        method(sgd)(parameters()).load_state_dict(sgd(parameters()).state_dict())


def test_what_cannot_be_saved_is_named(tmp_path: Path) -> None:
    params, optimizer = made(sgd, 1)
    optimizer.inner.state[params[0]]["projector"] = object()
    with pytest.raises(CheckpointError, match="inner optimizer, SGD, keeps a object as projector of parameter 0"):
        save_workers(tmp_path, optimizer)
    assert not (tmp_path / MANIFEST).exists()


@pytest.mark.parametrize(
    ("tensors", "others", "message"),
    [
        ({"inner.9.exp_avg": torch.zeros(1)}, "{}", "has inner.9.exp_avg, of 5 parameters"),
        ({}, '{"inner.-1.count": 1}', "has inner.-1.count, of 5 parameters"),
        ({"inner.one": torch.zeros(1)}, "{}", "state of the inner optimizer is not valid"),
        ({}, "nonsense", "state of the inner optimizer is not valid"),
        ({}, "[1]", "state of the inner optimizer is not valid"),
    ],
)
def test_malformed_states_are_refused(tensors: dict[str, Tensor], others: str, message: str, tmp_path: Path) -> None:
    params, optimizer = made(adamw, 1)
    go_on(params, optimizer, range(2))
    save_workers(tmp_path, optimizer)
    [part] = tmp_path.glob("worker_*")
    save_file(load_file(part) | tensors, part, {"inner.": others})
    manifest = Manifest.read(tmp_path)
    manifest.files[part.name] = entry_of(part)
    manifest.write(tmp_path)
    before = [parameter.detach().clone() for parameter in params]
    with pytest.raises(CheckpointError, match=message):
        load_workers(tmp_path, optimizer)
    assert all(map(torch.equal, params, before))


def test_numbers_stand_in_the_metadata(tmp_path: Path) -> None:
    params, optimizer = made(counting, 1)
    go_on(params, optimizer, range(2))
    save_workers(tmp_path, optimizer)
    [part] = tmp_path.glob("worker_*")
    with safe_open(part, framework="pt") as file:
        others = json.loads(file.metadata()["inner."])
        assert file.get_tensor("inner.2.codes").dtype == torch.uint8
    assert (others["inner.2.count"], others["inner.2.kind"], others["inner.2.none"]) == (2, "counting", None)
