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

from tests.examples.images import write_images
from tests.harness import run_workers
from tests.trainer.tiny import act_as_launched

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

from arguments import ArgumentsError, parse_arguments  # noqa: E402
from train_vit import DEFAULTS, ScriptArguments, build_trainer  # noqa: E402
from vit_models import ModelError, build_model  # noqa: E402

from hf_dlion import DLionTrainer, DLionTrainingArguments  # noqa: E402

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


def recorded_steps(
    rank: int, images: str, output: str, more: list[str], checkpoint: str | None = None
) -> list[torch.Tensor]:
    """The pixels of each batch of this worker."""
    if dist.is_initialized():
        act_as_launched(rank)
    fixed = ["--dataset", images, "--output_dir", output, *SMALL, "--optim", "dlion_mavo"]
    trainer, _ = build_trainer(*parse([*fixed, *more]))
    seen: list[torch.Tensor] = []
    step = trainer.training_step

    def recording(model: Any, inputs: dict[str, torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(inputs["pixel_values"].clone())
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = recording
    trainer.train(resume_from_checkpoint=checkpoint)
    return seen


def rounds_of_two_virtual_workers(images: str, output: str, *more: str) -> list[torch.Tensor]:
    """The batches of the first two epochs in one process that has two workers."""
    script_args, args = parse(["--dataset", images, "--output_dir", output, *SMALL, *more])
    args.virtual_workers = 2
    trainer, _ = build_trainer(script_args, args)
    loader = trainer.get_train_dataloader()
    found = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        found += [batch["pixel_values"] for batch in loader]
    return found


@pytest.mark.parametrize(
    "more", [[], ["--dirichlet", "1.0", "--dataloader_num_workers", "1"]], ids=["iid", "dirichlet"]
)
def test_a_worker_meets_the_same_pixels_as_a_process_and_as_a_virtual_one(
    more: list[str], images: str, tmp_path: Path
) -> None:
    by_process = run_workers(recorded_steps, 2, images, str(tmp_path), ["--max_steps", "6", *more])
    virtual = rounds_of_two_virtual_workers(images, str(tmp_path / "virtual"), *more)
    assert len(virtual) == 16
    for rank, seen in enumerate(by_process):
        assert len(seen) == 6
        assert all(torch.equal(mine, other) for mine, other in zip(seen, virtual[rank::2], strict=False))
    assert not torch.equal(by_process[0][0], by_process[0][4])  # the next epoch has another order


@pytest.mark.parametrize(("processes", "saved", "steps"), [(1, 11, 13), (2, 5, 7)])
def test_resuming_in_the_second_epoch_goes_on_with_its_batches(
    processes: int, saved: int, steps: int, images: str, tmp_path: Path
) -> None:
    output, limits = str(tmp_path), ["--max_steps", str(steps), "--save_steps", str(saved)]
    runs = []
    for checkpoint in (None, f"{output}/checkpoint-{saved}"):
        if processes == 1:
            runs.append([recorded_steps(0, images, output, limits, checkpoint)])
        else:
            runs.append(run_workers(recorded_steps, processes, images, output, limits, checkpoint))
    for whole, resumed in zip(*runs, strict=True):
        assert (len(whole), len(resumed)) == (steps, steps - saved)
        assert all(torch.equal(a, b) for a, b in zip(resumed, whole[saved:], strict=True))


def test_digits_are_learned_by_two_processes(tmp_path: Path) -> None:
    launch = ["accelerate.commands.launch", "--config_file", "examples/configs/cpu_2.yaml", "examples/train_vit.py"]
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


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/configs/recipes").glob("vit*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_read(recipe: Path, tmp_path: Path) -> None:
    script_args, args = parse(["--config", str(recipe), "--output_dir", str(tmp_path), "--bf16", "False"])
    assert args.votes
    with torch.device("meta"):
        model = build_model(script_args.model, script_args.image_size or 32, ["a", "b"])
    assert model.config.num_hidden_layers == (6 if "cifar" in recipe.stem else 12)
