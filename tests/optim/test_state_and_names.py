"""What had another name is still taken by it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_dlion import DistributedLion, DistributedMuon, load_workers, save_workers
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.methods import METHODS
from tests.optim.test_methods import one_group


@pytest.mark.parametrize("name", METHODS)
def test_check_replicas_every(name: str) -> None:
    params = one_group(name, torch.nn.Parameter(torch.ones(3, 3)))
    with pytest.warns(FutureWarning, match="check_replicas_every is now check_replicas_steps"):
        optimizer = METHODS[name].optimizer(params, check_replicas_every=7, **METHODS[name].fixed)  # type: ignore[call-arg]
    assert optimizer.options()["check_replicas_steps"] == 7


def test_both_names_at_once() -> None:
    with pytest.raises(TypeError, match="check_replicas_every and check_replicas_steps were given"):
        DistributedLion([torch.nn.Parameter(torch.ones(3))], check_replicas_steps=1, check_replicas_every=2)  # type: ignore[call-arg]


def test_arguments_of_checkpoints(tmp_path: Path) -> None:
    optimizer = VirtualWorkers([torch.nn.Parameter(torch.ones(3))], 2, DistributedLion)
    with pytest.warns(FutureWarning, match="seals is now write_manifest"):
        save_workers(tmp_path, optimizer, seals=True)  # type: ignore[call-arg]
    with pytest.warns(FutureWarning, match="other_workers is now resume_world_size_policy"):
        load_workers(tmp_path, optimizer, other_workers="reset")  # type: ignore[call-arg]


def test_attributes() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    for optimizer in (DistributedLion([parameter]), VirtualWorkers([parameter], 2, DistributedLion)):
        assert optimizer.abstentions == optimizer.bad_gradients == 0


def test_state_is_made_at_the_first_step_or_when_it_is_loaded() -> None:
    parameter, other = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, loaded = DistributedLion([parameter]), DistributedLion([other])
    assert not optimizer.state
    loaded.load_state_dict(optimizer.state_dict())
    assert not loaded.state
    parameter.grad = torch.ones(3)
    optimizer.step()
    loaded.load_state_dict(optimizer.state_dict())
    assert torch.equal(loaded.state[other]["momentum"], optimizer.state[parameter]["momentum"])
    with pytest.raises(ValueError, match="there is none"):
        loaded.load_state_dict(optimizer.state_dict() | {"state": {0: {}}})


def test_a_state_that_was_asked_for_too_early_is_made_all_the_same() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = DistributedLion([parameter])
    assert "momentum" not in optimizer.state[parameter]  # torch's defaultdict has an entry now
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[parameter]["momentum"].all()


def test_the_state_of_another_method_with_the_same_tensors_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 3))
    parameter.grad = torch.ones(3, 3)
    lion = DistributedLion([parameter])
    lion.step()
    muon = DistributedMuon([{"params": [parameter], "orthogonal": True}])
    with pytest.raises(ValueError, match="no orthogonal in a param group"):
        muon.load_state_dict(lion.state_dict())


def test_a_new_memory_format_takes_the_momentum_along() -> None:
    one, other = (torch.nn.Parameter(torch.ones(4, 3, 2, 2)) for _ in range(2))
    for parameter in (one, other):
        optimizer = DistributedLion([parameter], lr=0.1)
        for step in range(4):
            if step == 2 and parameter is one:
                parameter.data = parameter.data.to(memory_format=torch.channels_last)
            parameter.grad = torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(step))
            optimizer.step()
        state = optimizer.state[parameter]["momentum"]
        assert state.stride() == parameter.stride()
    assert torch.equal(one, other)
