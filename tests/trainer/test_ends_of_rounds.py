"""Local steps where a training is stopped in a round: by an evaluation, by an error, or to be saved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from tests.trainer import tiny
from tests.trainer.test_local_steps import saved_weights
from tests.trainer.test_trainer import weights


@pytest.mark.parametrize("best", [True, False])
def test_an_evaluation_that_ends_the_training(best: bool, tmp_path: Path) -> None:
    """It comes in a round, after the model was evaluated: 8 steps are an epoch, and a round is 5."""
    stopping: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": best}
    stopping |= {"metric_for_best_model": "loss", "greater_is_better": True}
    options: dict[str, Any] = {"optim": "adamw_torch", "local_steps": 5, "learning_rate": 1e-2}
    run = tiny.trainer(0, tmp_path, **options, **stopping, virtual_workers=2, max_steps=-1, num_train_epochs=5)
    run.add_callback(EarlyStoppingCallback(1))
    run.train()
    assert run.state.global_step == 16
    members = run._own_optimizer().members
    assert not any(member.between_votes for member in members)
    run.save_model(str(tmp_path / "end"))
    end = saved_weights(run, tmp_path / "end/model.safetensors")
    assert torch.equal(end, weights(run.model))
    if best:
        assert torch.equal(end, saved_weights(run, tmp_path / "checkpoint-8/model.safetensors"))
    else:
        assert torch.equal(members[0].common_parameters()[0], members[1].common_parameters()[0])
        assert not torch.equal(end, saved_weights(run, tmp_path / "checkpoint-16/model.safetensors"))


def test_what_is_gathered_of_shards_to_be_saved_is_what_was_voted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FSDP2 gathers the weights before it calls `_save`; here one process stands for the shards."""
    run = tiny.trainer(0, tmp_path, optim="adamw_torch", local_steps=4, max_steps=2, learning_rate=1e-2)

    class Saves(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            with monkeypatch.context() as patch:
                plugin = SimpleNamespace(state_dict_type="FULL_STATE_DICT")
                patch.setattr(run, "is_fsdp_enabled", True)
                patch.setitem(run.accelerator.state.__dict__, "fsdp_plugin", plugin)
                whole = {name: one.clone() for name, one in run.model.state_dict().items()}
                patch.setattr(
                    run.accelerator,
                    "get_state_dict",
                    lambda model: {name: one.clone() for name, one in model.state_dict().items()},
                )
                run.save_model(str(tmp_path / f"{state.global_step}"))
                assert all(torch.equal(one, whole[name]) for name, one in run.model.state_dict().items())

    before = weights(run.model)
    run.add_callback(Saves())
    run.train()
    assert torch.equal(saved_weights(run, tmp_path / "1/model.safetensors"), before)


class Interrupts(TrainerCallback):
    """At a step, the loss of the second worker's turn is not to be had."""

    def __init__(self, run: Any, at: int) -> None:
        self.at, self.turns = at, 0
        self.compute, run.compute_loss = run.compute_loss, self.loss

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.turns = 0 if state.global_step == self.at else -10

    def loss(self, *args: Any, **kwargs: Any) -> Any:
        self.turns += 1
        if self.turns == 2:
            raise KeyboardInterrupt
        return self.compute(*args, **kwargs)


def test_goes_on_in_the_same_process_after_an_interruption_in_a_turn(tmp_path: Path) -> None:
    options: dict[str, Any] = {"optim": "gmuon", "local_steps": 4, "max_steps": 8, "virtual_workers": 2}
    options |= {"learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 4}
    run = tiny.trainer(0, tmp_path, **options)
    interrupts = Interrupts(run, at=6)
    run.add_callback(interrupts)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    interrupts.at = -1
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    fresh = tiny.trainer(0, tmp_path, **options)
    fresh.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert torch.equal(weights(run.model), weights(fresh.model))
