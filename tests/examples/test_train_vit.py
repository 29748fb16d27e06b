"""The example of image classification: workers' data, resuming, learning, its errors and recipes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForImageClassification, ViTImageProcessorPil

from common.arguments import parse_arguments
from common.errors import ArgumentsError, ModelError
from common.vit_models import build_model
from hf_dlion import DLionTrainer, DLionTrainingArguments
from tests.examples.images import write_images
from tests.harness import run_workers
from tests.trainer.tiny import act_as_launched
from train_vit import DEFAULTS, ScriptArguments, build_trainer

ROOT = Path(__file__).parents[2]

QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "5"]
# 36 images: with 2 workers, an epoch has 4 rounds
SMALL = ["--per_device_train_batch_size", "4", "--eval_strategy", "no", "--eval_on_start", "False"]


def parse(argv: list[str]) -> tuple[ScriptArguments, DLionTrainingArguments]:
    sys.argv = ["train_vit.py", *QUIET, *argv]
    script_args, args = parse_arguments([ScriptArguments, DLionTrainingArguments], "doc", DEFAULTS)
    return script_args, args


@pytest.fixture(autouse=True)
def _argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_images(tmp_path_factory.mktemp("images")))


def whole_and_resumed(rank: int, images: str, output: str, steps: int, saved: int) -> list[list[torch.Tensor]]:
    """The pixels of each batch of this worker: in a run, and in one that is resumed after `saved` steps of it."""
    if dist.is_initialized():
        act_as_launched(rank)
    fixed = ["--dataset", images, "--output_dir", output, *SMALL, "--optim", "dlion_mavo", "--dirichlet", "1.0"]
    runs = []
    for checkpoint in (None, f"{output}/checkpoint-{saved}"):
        seen: list[torch.Tensor] = []
        trainer = build([*fixed, "--max_steps", str(steps), "--save_steps", str(saved)])
        step = trainer.training_step

        def recording(model: Any, inputs: Any, *args: Any, step: Any = step, seen: Any = seen, **kwargs: Any) -> Any:
            seen.append(inputs["pixel_values"].clone())
            return step(model, inputs, *args, **kwargs)

        trainer.training_step = recording
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(seen)
    return runs


def rounds_of_virtual_workers(images: str, output: str, workers: int) -> list[torch.Tensor]:
    """The batches of the first two epochs of one process with so many workers."""
    script_args, args = parse(["--dataset", images, "--output_dir", output, *SMALL, "--dirichlet", "1.0"])
    args.virtual_workers = workers
    trainer, _ = build_trainer(script_args, args)
    loader = trainer.get_train_dataloader()
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += [batch["pixel_values"] for item in loader for batch in (item if workers > 1 else [item])]
    return found


@pytest.mark.parametrize(("workers", "steps", "saved"), [(1, 13, 11), (2, 7, 5)])
def test_a_worker_meets_the_same_pixels_as_a_process_as_a_virtual_one_and_resumed(
    workers: int, steps: int, saved: int, images: str, tmp_path: Path
) -> None:
    # the checkpoint is one of the second epoch: an epoch has 9 batches of one worker, or 4 of each of two
    run = (images, str(tmp_path), steps, saved)
    processes = [whole_and_resumed(0, *run)] if workers == 1 else run_workers(whole_and_resumed, workers, *run)
    virtual = rounds_of_virtual_workers(images, str(tmp_path / "virtual"), workers)
    for rank, (whole, resumed) in enumerate(processes):
        assert (len(whole), len(resumed)) == (steps, steps - saved)
        assert all(torch.equal(mine, other) for mine, other in zip(whole, virtual[rank::workers], strict=False))
        assert all(torch.equal(mine, other) for mine, other in zip(resumed, whole[saved:], strict=True))
        assert not torch.equal(whole[0], whole[len(virtual) // 2 // workers])  # another order in the next epoch


def test_digits_are_learned_by_two_processes(tmp_path: Path) -> None:
    launch = ["accelerate.commands.launch", "--config_file", "examples/launch/cpu_2.yaml", "examples/train_vit.py"]
    run = [sys.executable, "-m", *launch, *QUIET, "--optim", "dlion_mavo", "--learning_rate", "5e-4"]
    run += ["--num_train_epochs", "4", "--model_card", "--output_dir", str(tmp_path)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    curve = {entry["step"]: entry["eval_accuracy"] for entry in results["log_history"] if "eval_accuracy" in entry}
    assert list(curve) == [0, 22, 44, 66, 88]
    assert len(curve) == sum("eval_accuracy" in entry for entry in results["log_history"])
    assert curve[0] < 0.25
    assert results["validation_accuracy"] == curve[88] > 0.4
    assert results["validation_perplexity"] is None
    assert (results["workers"], results["classes"], results["images_of_workers"]) == (2, 10, [719, 718])
    assert "validation accuracy" in done.stdout
    assert "perplexity" not in done.stdout
    card = (tmp_path / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card
    assert f"| validation accuracy | {curve[88]:.2%} |" in card
    assert "perplexity" not in card
    model = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert model.config.id2label[7] == "7"
    assert ViTImageProcessorPil.from_pretrained(tmp_path).size["height"] == 8


def test_a_loss_is_the_mean_over_the_worker_s_images(images: str, tmp_path: Path) -> None:
    trainer = build(["--dataset", images, "--output_dir", str(tmp_path), *SMALL, "--optim", "dlion_avg"])
    batches = [next(iter(trainer.get_train_dataloader())) for _ in range(2)]
    count = trainer._get_num_items_in_batch(batches, trainer.args.device)
    losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count) for batch in batches]
    with torch.no_grad():
        logits = [trainer.model(pixel_values=batch["pixel_values"]).logits for batch in batches]
    labels = torch.cat([batch["labels"] for batch in batches])
    expected = torch.nn.functional.cross_entropy(torch.cat(logits), labels)
    assert sum(losses).item() == pytest.approx(expected.item(), rel=1e-5)


def build(argv: list[str]) -> DLionTrainer:
    return build_trainer(*parse(argv))[0]


@pytest.mark.parametrize(
    ("name", "size", "parameters", "patches"),
    [
        ("vit-mini", 32, 0.31, 16),
        ("vit-cifar", 32, 9.5, 64),
        ("vit-small-16", 224, 21.7, 196),
        ("vit-base-16", 224, 85.8, 196),
    ],
)
def test_models_have_the_sizes_of_their_names(name: str, size: int, parameters: float, patches: int) -> None:
    with torch.device("meta"):
        model = build_model(name, size, ["a"] * 10)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(parameters, rel=0.02)
    assert model.vit.embeddings.position_embeddings.shape[1] == patches + 1
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (["--model", "vit-small-16", "--image_size", "40"], ModelError, "patches of 16 x 16. Give --image_size 32"),
        (["--model", "no-such-model"], ModelError, "not one of vit-mini, .* no config could be loaded"),
        (["--image_size", "0"], ArgumentsError, "--image_size 0: it is a number of pixels"),
    ],
)
def test_wrong_arguments_are_errors(
    argv: list[str], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(error, match=message):
        build(["--output_dir", str(tmp_path), *argv])


def test_an_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = [*QUIET, "--output_dir", str(tmp_path / "out"), "--per_device_train_batch_size", "2000"]
    monkeypatch.setattr(sys, "argv", ["train_vit.py", *argv])
    with pytest.raises(SystemExit, match="^train_vit.py: 1437 images for 1 workers by equal parts: worker 0 has 1437"):
        runpy.run_path(str(ROOT / "examples" / "train_vit.py"), run_name="__main__")


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/recipes").glob("vit*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_read(recipe: Path, tmp_path: Path) -> None:
    script_args, args = parse(["--config", str(recipe), "--output_dir", str(tmp_path), "--bf16", "False"])
    assert args.votes
    with torch.device("meta"):
        model = build_model(script_args.model, script_args.image_size or 32, ["a", "b"])
    assert model.config.num_hidden_layers == (6 if "cifar" in recipe.stem else 12)
