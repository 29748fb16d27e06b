"""A checkpoint just before a job is ended: a SIGTERM that reaches the ranks at different places of a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_dlion import DLionTrainer
from tests.harness import run_workers
from tests.trainer import tiny
from tests.trainer.test_trainer import weights


class Asked(TrainerCallback):
    """Asks as transformers' handler of the signal does: of rank 0 in its update, of others as it begins a step."""

    def __init__(self, rank: int, trainer: DLionTrainer) -> None:
        self.rank, self.trainer = rank, trainer

    def ask(self) -> None:
        for callback in self.trainer.callback_handler.callbacks:
            if hasattr(callback, "jit_manager"):
                callback.jit_manager.is_checkpoint_requested = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 2 and self.rank != 0:
            self.ask()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == 2 and self.rank == 0:
            self.ask()


def end_and_go_on(rank: int, folder: str, options: dict[str, Any]) -> tuple[int, torch.Tensor, torch.Tensor]:
    """The step at which it stopped, and the weights of a training that was, and of one that was not stopped."""
    options = {"max_steps": 6, "lr_scheduler_type": "constant", **options}
    stopped = tiny.trainer(rank, folder, enable_jit_checkpoint=True, **options)
    stopped.add_callback(Asked(rank, stopped))
    stopped.train()
    again = tiny.trainer(rank, folder, **options)
    again.train(resume_from_checkpoint=True)
    whole = tiny.trainer(rank, f"{folder}/whole", **options)
    whole.train()
    return stopped.state.global_step, weights(again.model), weights(whole.model)


@pytest.mark.parametrize("options", [{"optim": "dmuon_mavo"}, {"optim": "adamw_torch", "local_steps": 4}])
def test_all_ranks_save_after_the_same_step(options: dict[str, Any], tmp_path: Path) -> None:
    for step, again, whole in run_workers(end_and_go_on, 2, str(tmp_path), options):
        assert step == 3
        assert torch.equal(again, whole)


@pytest.mark.parametrize("workers", [1, 2])
def test_in_one_process(workers: int, tmp_path: Path) -> None:
    step, again, whole = end_and_go_on(0, str(tmp_path), {"virtual_workers": workers})
    assert step == 3
    assert torch.equal(again, whole)
