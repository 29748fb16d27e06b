"""Virtual workers in the Trainer, against as many processes."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_dlion import DLionTrainer
from hf_dlion.trainer.report import run_report
from tests.harness import run_workers
from tests.trainer import tiny
from tests.trainer.test_trainer import weights

TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second")


def train(rank: int, folder: str, options: dict[str, Any]) -> tuple[list[dict[str, float]], torch.Tensor, Any]:
    trainer = tiny.trainer(rank, folder, **options)
    trainer.train()
    log = [{key: value for key, value in entry.items() if key not in TIMES} for entry in trainer.state.log_history]
    return log, weights(trainer.model), run_report(trainer)


@pytest.mark.parametrize(
    ("chosen", "workers"),
    [
        ({"optim": "dlion_mavo"}, 3),
        ({"optim": "dlion_avg"}, 2),
        ({"optim": "dmuon_mavo"}, 2),
        ({"optim": "dmuon_avg", "muon_rest": "average"}, 3),
        ({"optim": "terngrad"}, 2),
    ],
)
def test_bitwise_what_processes_train(chosen: dict[str, str], workers: int, tmp_path: Path) -> None:
    options = chosen | {"max_steps": 5, "logging_steps": 1, "max_grad_norm": 0.5}
    processes = run_workers(train, workers, str(tmp_path), options)
    log, ours, report = train(0, str(tmp_path), options | {"virtual_workers": workers})
    expected_log, theirs, expected = processes[0]
    assert torch.equal(ours, theirs)
    for entry, reference in zip(log, expected_log, strict=True):
        assert entry == pytest.approx(reference, rel=1e-5)  # losses and norms are summed in another order
    for key in ("workers", "rows_per_step", "bytes_sent", "bytes_received", "bytes_fp32_allreduce", "steps"):
        assert report[key] == expected[key]
    assert report["gradient_accumulation_steps"] == 1


def test_resumes_with_every_worker_s_momentum(tmp_path: Path) -> None:
    options = {"virtual_workers": 3, "max_steps": 6, "lr_scheduler_type": "constant"}
    _, whole, _ = train(0, str(tmp_path / "whole"), options)
    train(0, str(tmp_path), options | {"max_steps": 3, "save_strategy": "steps", "save_steps": 3})
    trainer = tiny.trainer(0, tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(weights(trainer.model), whole)


def test_adversaries_change_the_vote(tmp_path: Path) -> None:
    options = {"virtual_workers": 3, "max_steps": 2}
    _, honest, _ = train(0, str(tmp_path), options)
    _, flipped, report = train(0, str(tmp_path), options | {"adversaries": 1})
    assert not torch.equal(honest, flipped)
    assert report["adversaries"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"virtual_workers": 0}, "virtual_workers=0"),
        ({"virtual_workers": 2, "optim": "adamw_torch"}, "'adamw_torch'.*gadamw"),
        ({"adversaries": 1}, "adversaries=1 with virtual_workers=1"),
        ({"virtual_workers": 2, "adversaries": 3}, "adversaries=3"),
        ({"virtual_workers": 2, "adversaries": 1, "adversary": "liar"}, "adversary='liar'"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, **options)


def refused(rank: int, folder: str) -> str:
    with pytest.raises(ValueError, match="virtual_workers=2 in 2 processes") as caught:
        tiny.trainer(rank, folder, virtual_workers=2)
    return str(caught.value)


def test_not_in_several_processes(tmp_path: Path) -> None:
    run_workers(refused, 2, str(tmp_path))


def test_each_trial_of_a_search_gives_rounds_of_batches(tmp_path: Path) -> None:
    run = tiny.trainer(0, tmp_path, virtual_workers=2)
    rounds = len(run.get_train_dataloader())
    run.create_accelerator_and_postprocess()  # as a search does for each trial
    assert len(run.get_train_dataloader()) == rounds
    run.train()


class WithAStepOfItsOwn(DLionTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss.detach()


def own_steps(rank: int, folder: str, options: dict[str, Any]) -> torch.Tensor:
    if options.get("virtual_workers", 1) == 1:
        tiny.act_as_launched(rank)
    args = tiny.arguments(folder, max_grad_norm=0.0, **options)
    trainer = WithAStepOfItsOwn(model=tiny.model(), args=args, train_dataset=tiny.rows())
    trainer.train()
    return weights(trainer.model)


@pytest.mark.parametrize(
    "options",
    [{"optim": "dlion_mavo"}, {"optim": "adamw_torch", "gradient_votes": "avg"}],
    ids=["dlion_mavo", "gradient_votes"],
)
def test_a_training_step_of_one_s_own_is_each_worker_s(options: dict[str, Any], tmp_path: Path) -> None:
    theirs = run_workers(own_steps, 2, str(tmp_path), options)
    assert torch.equal(own_steps(0, str(tmp_path), options | {"virtual_workers": 2}), theirs[0])


class Masking(TrainerCallback):
    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        """Would have changed gradients."""


def test_a_callback_that_sees_no_gradients_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for workers in (1, 2):
        trainer = tiny.trainer(0, tmp_path, virtual_workers=workers, max_steps=1)
        trainer.add_callback(Masking())
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert ("Masking.on_pre_optimizer_step sees no gradients" in caplog.text) == (workers == 2)


def test_batches_of_no_loader_are_refused(tmp_path: Path) -> None:
    class Batches(list[Any]):
        pass

    class Own(DLionTrainer):
        def get_train_dataloader(self) -> Any:
            return Batches(super().get_train_dataloader())

    args = tiny.arguments(tmp_path, virtual_workers=2)
    with pytest.raises(ValueError, match="virtual_workers=2, and a train loader of class Batches.*DataLoader"):
        Own(model=tiny.model(), args=args, train_dataset=tiny.rows()).train()
