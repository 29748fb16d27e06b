"""The report of a run and its model card."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import EvalResult, ModelCard
from transformers import Trainer

from hf_dlion import DistributedMuon, DLionTrainer, hidden_matrices
from hf_dlion.trainer.card import CARD, CURVE
from hf_dlion.trainer.report import method_options, run_report
from hf_dlion.wire.ledger import fp32_all_reduce_bytes
from tests.harness import run_workers
from tests.trainer import tiny


def trained(rank: int, folder: str, **options: Any) -> DLionTrainer:
    trainer = tiny.trainer(rank, folder, eval_strategy="steps", eval_steps=2, logging_steps=1, **options)
    trainer.train()
    return trainer


def card_of_a_run(rank: int, folder: str) -> tuple[dict[str, Any], list[dict[str, float]]]:
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"  # as `accelerate launch` leaves it
    trainer = trained(rank, folder)
    trainer.create_model_card(model_name="counts", dataset=["some/dataset", "a folder/of mine"], license="mit")
    return run_report(trainer), trainer.state.log_history


def test_the_card_says_what_the_run_was(tmp_path: Path) -> None:
    (report, log), _ = run_workers(card_of_a_run, 2, str(tmp_path))
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.library_name == "transformers"
    assert card.data.license == "mit"
    assert card.data.datasets == ["some/dataset"]
    assert "dlion_mavo" in card.data.tags
    [loss] = [result for result in card.data.eval_results if result.metric_type == "loss"]
    last = [entry["eval_loss"] for entry in log if "eval_loss" in entry][-1]
    assert loss.metric_value == pytest.approx(last, abs=1e-4)
    assert (tmp_path / CURVE).stat().st_size > 1000
    sent = [entry["bytes_sent_total"] for entry in log if "bytes_sent_total" in entry][-1]
    parameters = sum(p.numel() for p in tiny.model().parameters())
    assert (report["workers"], report["bytes_counted_steps"], report["precision"]) == (2, 4, "bf16")
    assert report["bytes_sent"] == sent + 4 * 8  # the last log counted votes after it had counted bytes
    assert report["bytes_fp32_allreduce"] == 4 * fp32_all_reduce_bytes(parameters, 2)
    for row in (
        f"| bytes a worker sent, 4 steps | {report['bytes_sent']:,} |",
        f"| bytes of an fp32 all-reduce | {report['bytes_fp32_allreduce']:,} |",
        "| workers | 2 |",
        "| `tie` | `zero` |",
        "| data | some/dataset, a folder/of mine |",
        "as in [Liu et al., NeurIPS 2024]",
    ):
        assert row in card.text
    assert report["command"] in card.text


def test_writing_a_card_again_keeps_the_results_of_other_evaluations(tmp_path: Path) -> None:
    trainer = trained(0, tmp_path)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / CARD)
    arc = EvalResult("text-generation", "arc", "ARC", "acc", 0.25)
    card.data.eval_results = [*card.data.eval_results, arc]
    card.text += "\n## Evaluation\n\nARC 0.25\n\n## Thanks\n\nto all\n"
    card.save(tmp_path / CARD)
    for _ in range(2):
        trainer.create_model_card()
    again = ModelCard.load(tmp_path / CARD)
    assert [result.dataset_type for result in again.data.eval_results] == ["validation", "validation", "arc"]
    assert again.text.count("## Evaluation\n\nARC 0.25") == 1


def test_a_run_of_another_optimizer_without_validation(tmp_path: Path) -> None:
    trainer = tiny.trainer(0, tmp_path, optim="adamw_torch")
    trainer.train()
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / CARD)
    assert card.data.eval_results is None
    assert "| bytes a worker sent, 4 steps | not measured |" in card.text
    assert "`adamw_torch` of transformers" in card.text or 'optim="adamw_torch"' in card.text


def test_the_card_says_what_is_averaged(tmp_path: Path) -> None:
    for rest in ("vote", "average"):
        trainer = tiny.trainer(0, tmp_path, optim="dmuon_avg", muon_rest=rest, max_steps=2)
        trainer.train()
        trainer.create_model_card()
        text = ModelCard.load(tmp_path / CARD).text
        assert ("AdamW on averaged gradients for what is no hidden matrix)" in text) == (rest == "average")
        assert ("| `rest` | `average` |" in text) == (rest == "average")


def test_the_card_says_what_an_optimizer_was_made_with(tmp_path: Path) -> None:
    model = tiny.model()
    own = DistributedMuon(hidden_matrices(model), ns_steps=5)
    args = tiny.arguments(tmp_path, optim="dmuon_mavo", muon_ns_steps=3)
    assert method_options(args, own)["ns_steps"] == 5
    assert method_options(args, DistributedMuon(hidden_matrices(model), ns_steps=3))["ns_steps"] == 3


def test_the_card_takes_what_push_to_hub_gives() -> None:
    theirs = inspect.signature(Trainer.create_model_card).parameters
    assert set(theirs) <= set(inspect.signature(DLionTrainer.create_model_card).parameters)
