"""gradient_votes in the Trainer: over processes and in turns, with optimizers of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

from hf_dlion import DistributedLion
from hf_dlion.trainer.report import run_report
from tests.harness import run_workers
from tests.trainer import tiny
from tests.trainer.test_trainer import weights

OPTIONS = {"optim": "adamw_torch", "gradient_votes": "avg", "max_steps": 4, "logging_steps": 1, "max_grad_norm": 0.5}
FIGURES = ("bits_sent_per_param", "bits_received_per_param", "fp32_allreduce_ratio", "vote_ties", "vote_unanimous")


def train(rank: int, folder: str, options: dict[str, Any]) -> tuple[list[dict[str, float]], torch.Tensor, Any, str]:
    trainer = tiny.trainer(rank, folder, **(OPTIONS | options))
    trainer.train()
    trainer.create_model_card()
    card = Path(folder, "README.md").read_text(encoding="utf-8") if rank == 0 else ""
    return trainer.state.log_history, weights(trainer.model), run_report(trainer), card


SETTINGS: list[dict[str, Any]] = [
    {"gradient_accumulation_steps": 2},
    {"gradient_votes": "mavo", "optim": "adafactor"},
]


def several(rank: int, folder: str) -> list[Any]:
    return [train(rank, f"{folder}/{rank}/{number}", options) for number, options in enumerate(SETTINGS)]


def test_bitwise_what_virtual_workers_train(tmp_path: Path) -> None:
    everyone = run_workers(several, 2, str(tmp_path))
    for (log, theirs, report, card), options in zip(everyone[0], SETTINGS, strict=True):
        own_log, ours, own, _ = train(0, str(tmp_path / "turns"), options | {"virtual_workers": 2})
        assert torch.equal(ours, theirs)
        assert log[-2]["bad_gradients"] == 0
        assert log[-2]["vote_ties"] == own_log[-2]["vote_ties"]
        assert log[-2]["loss"] == pytest.approx(own_log[-2]["loss"], rel=1e-5)
        assert set(FIGURES) <= log[-2].keys()
        assert 1 <= log[-2]["bits_sent_per_param"] < 1.2
        assert report["bytes_sent"] == pytest.approx(own["bytes_sent"], rel=0.05)  # cut into other buckets
        assert report["method"] == (OPTIONS | options)["optim"]
        assert f'one bit a parameter each (`gradient_votes="{report["gradient_votes"]}"` of hf_dlion)' in card
    for runs in everyone:
        assert all(torch.equal(one[1], first[1]) for one, first in zip(runs, everyone[0], strict=True))


class Stream(IterableDataset[Any]):
    """Of rows, without a length: an epoch is a step and a half."""

    def __iter__(self) -> Iterator[Any]:
        yield from tiny.rows(24)


def twice(rank: int, folder: str, options: dict[str, Any]) -> tuple[torch.Tensor, list[list[dict[str, float]]]]:
    """The weights after two trainings by one Trainer on a stream, and their logs."""
    run = tiny.trainer(rank, folder, **OPTIONS | {"gradient_accumulation_steps": 4, "max_grad_norm": 0} | options)
    run.args.per_device_train_batch_size = run.args._train_batch_size = 2
    run._train_batch_size = 2
    run.train_dataset = Stream()
    logs = []
    for _ in range(2):
        run.train()
        logs.append([entry for entry in run.state.log_history if "bytes_sent_total" in entry])
    return weights(run.model), logs


def test_what_an_epoch_leaves_over_is_not_voted_on_yet_and_logs_begin_anew(tmp_path: Path) -> None:
    everyone = run_workers(twice, 2, str(tmp_path), {})
    ours, _ = twice(0, str(tmp_path), {"virtual_workers": 2})
    for theirs, (first, second) in everyone:
        assert torch.equal(theirs, ours)
        assert len(first) == len(second) == 4
        for before, after in zip(first, second, strict=True):
            assert after["bytes_sent_total"] == pytest.approx(before["bytes_sent_total"], rel=0.05)


def test_noise_is_that_of_the_step_after_resuming(tmp_path: Path) -> None:
    # In one process: torch 2.6 cannot load what transformers 4.57 saves on the CPU of several.
    options = OPTIONS | {"virtual_workers": 2, "lr_scheduler_type": "constant"}
    _, whole, _, _ = train(0, str(tmp_path), options | {"save_strategy": "steps", "save_steps": 2})
    trainer = tiny.trainer(0, tmp_path / "resumed", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(trainer.model), whole)


def test_one_worker_alone_has_its_own_signs(tmp_path: Path) -> None:
    log, voted, _, _ = train(0, str(tmp_path), {})
    _, averaged, _, _ = train(0, str(tmp_path), {"gradient_votes": None})
    assert not torch.equal(voted, averaged)
    assert log[-2]["bits_sent_per_param"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "dlion_mavo"}, "gradient_votes='avg' with optim='dlion_mavo'"),
        ({"gradient_votes": "mean"}, "gradient_votes='mean' is not known"),
        ({"adversaries": 1, "virtual_workers": 3}, "gradient_votes='avg' with adversaries=1"),
        ({"gradient_votes": None, "virtual_workers": 3}, "and for gradient_votes"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, **(OPTIONS | options))


def test_an_optimizer_that_votes_itself_is_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer(0, tmp_path, **OPTIONS)
    trainer.optimizer = DistributedLion(trainer.model.parameters())
    with pytest.raises(ValueError, match="an optimizer of class DistributedLion was given, which exchanges"):
        trainer.train()
