"""Checkpoints of finished runs, by other names, edited afterwards, or of other optimizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback

from hf_dlion import DistributedLion, DLionTrainer, last_complete_checkpoint, load_workers, save_workers
from hf_dlion.checkpoint.manifest import MANIFEST, CheckpointError, may_change
from tests.harness import what_is_logged
from tests.trainer import tiny
from tests.trainer.test_rounds import Stream
from tests.trainer.test_trainer import weights

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def trainer(folder: Path, data: Any = None, **options: Any) -> DLionTrainer:
    rows = tiny.rows(40) if data is None else data
    return DLionTrainer(model=tiny.model(), args=tiny.arguments(folder, **(SAVING | options)), train_dataset=rows)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optim": "adamw_torch"},
        {"virtual_workers": 2},
        {"max_steps": 12, "save_steps": 4},  # of 10 steps an epoch
        {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "epoch"},
        {"max_steps": -1, "num_train_epochs": 1.5, "save_steps": 5},
        {"data": Stream(12)},
    ],
)
def test_a_finished_run_makes_no_step_more(options: dict[str, Any], tmp_path: Path) -> None:
    first = trainer(tmp_path, **options)
    first.train()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for resume in (True, str(sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))[-1])):
        again = trainer(tmp_path, **options)
        output = again.train(resume_from_checkpoint=resume)
        assert output.global_step == again.state.global_step == first.state.global_step
        assert torch.equal(weights(again.model), weights(first.model))
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    if "data" not in options and not options.get("num_train_epochs"):
        longer = trainer(tmp_path, **{**options, "max_steps": first.state.max_steps + 1})
        longer.train(resume_from_checkpoint=True)
        assert longer.state.global_step == first.state.global_step + 1


def saved(folder: Path, steps: int) -> Path:
    """A checkpoint of a plain loop, after so many steps."""
    folder.mkdir(parents=True)
    parameter = torch.nn.Parameter(torch.zeros(4))
    optimizer = DistributedLion([parameter])
    for _ in range(steps):
        parameter.grad = torch.ones(4)
        optimizer.step()
    save_workers(folder, optimizer)
    return folder


@pytest.mark.parametrize(
    ("steps", "newest"),
    [
        ({"checkpoint_0": 2, "checkpoint_1": 4, "checkpoint_10": 6}, "checkpoint_10"),
        ({"checkpoint-2": 2, "checkpoint-10": 10}, "checkpoint-10"),
        ({"epoch_0": 8, "epoch_1": 16, "step_10": 10, "step_12": 12}, "epoch_1"),
        ({"best": 4, "checkpoint-4": 4}, "checkpoint-4"),
        ({"checkpoint-4": 4, "final": 6}, "final"),
    ],
)
def test_checkpoints_by_other_names(steps: dict[str, int], newest: str, tmp_path: Path) -> None:
    for name, count in steps.items():
        saved(tmp_path / name, count)
    (tmp_path / "runs_7").mkdir()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / newest)


@pytest.mark.parametrize("kind", ["checkpoint_", "checkpoint-"])
def test_an_interrupted_one_is_passed_over(kind: str, tmp_path: Path) -> None:
    for number in range(3):
        saved(tmp_path / f"{kind}{number}", 5 + number)
    (tmp_path / f"{kind}2" / MANIFEST).unlink()
    said = what_is_logged()
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / f"{kind}1")
    assert [text.split(" has ")[0] for text in said] == [f"passed over: {tmp_path / kind}2"]


class Editing(TrainerCallback):
    """Edits a file of every checkpoint after it was saved."""

    def __init__(self, name: str, reseal: bool = False) -> None:
        self.name, self.reseal = name, reseal

    def on_save(self, args: Any, state: Any, control: Any, optimizer: Any = None, **more: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        path = folder / self.name
        path.write_bytes((path.read_bytes() if path.exists() else b"") + b"\n")
        if self.reseal:
            save_workers(folder, optimizer)


@pytest.mark.parametrize("name", ["config.json", "README.md", "training_args.bin", "new.safetensors"])
def test_what_a_run_does_not_go_on_from_may_change(name: str, tmp_path: Path) -> None:
    edited = trainer(tmp_path)
    edited.add_callback(Editing(name))
    edited.train()
    again = trainer(tmp_path, max_steps=5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 5


def test_what_a_run_goes_on_from_may_not(tmp_path: Path) -> None:
    for reseal in (False, True):
        edited = trainer(tmp_path)
        edited.add_callback(Editing("trainer_state.json", reseal))
        edited.train()
        again = trainer(tmp_path, max_steps=5)
        if reseal:
            again.train(resume_from_checkpoint=True)
            continue
        with pytest.raises(CheckpointError) as caught:
            again.train(resume_from_checkpoint=True)
        for step in (2, 4):
            assert f"checkpoint-{step}/trainer_state.json is not what was written" in str(caught.value)
        for text in ("there is no complete checkpoint", "it may not change", "let it call save_workers(folder"):
            assert text in str(caught.value)
    assert not any(map(may_change, ["model.safetensors", "a/pytorch_model.bin", "rng_state_0.pth", "scheduler.pt"]))


def error_of(folder: Path, resume: str | bool = True, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        trainer(folder, **{**options, "max_steps": 6}).train(resume_from_checkpoint=resume)
    return str(caught.value)


def test_only_the_model_was_saved(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True).train()
    for resume in (True, str(tmp_path / "checkpoint-4")):
        said = error_of(tmp_path, resume)
        assert "only the model was saved (save_only_model=True)" in said
        assert f"from_pretrained('{tmp_path / 'checkpoint-4'}')" in said


def test_another_optimizer_s_run(tmp_path: Path) -> None:
    trainer(tmp_path / "adamw", optim="adamw_torch").train()
    for resume in (True, str(tmp_path / "adamw" / "checkpoint-4")):
        said = error_of(tmp_path / "adamw", resume)
        assert "no worker's state, but optimizer.pt: it is of a run with another optimizer" in said
        assert "from_pretrained(" in said
    trainer(tmp_path / "ours").train()
    for resume in (True, str(tmp_path / "ours" / "checkpoint-4")):
        said = error_of(tmp_path / "ours", resume, optim="adamw_torch")
        assert "was written by an optimizer of hf_dlion, whose state is not that of AdamW" in said
    said = error_of(tmp_path / "ours", optim="glion")
    assert "was written by DistributedLion, whose state is not that of GlobalLion" in said
    assert "from_pretrained(" in said


def test_adamw_resumes_as_ever(tmp_path: Path) -> None:
    trainer(tmp_path, optim="adamw_torch").train()
    resumed = []
    for kind in (Trainer, DLionTrainer):
        args = tiny.arguments(tmp_path, optim="adamw_torch", max_steps=6)
        again = kind(model=tiny.model(), args=args, train_dataset=tiny.rows(40))
        again.train(resume_from_checkpoint=True)
        resumed.append(weights(again.model))
    assert torch.equal(*resumed)


def test_what_a_param_group_has_keeps_its_form(tmp_path: Path) -> None:
    def made() -> DistributedLion:
        own = {"layers": [1, 2], "split": (3, [4.0, 5]), "name": "a", "none": None, "off": False}
        return DistributedLion([{"params": [torch.nn.Parameter(torch.zeros(4))], **own}])

    written, read = made(), made()
    save_workers(tmp_path, written)
    load_workers(tmp_path, read)
    kept = [{name: value for name, value in one.param_groups[0].items() if name != "params"} for one in (written, read)]
    assert kept[0] == kept[1]
    assert json.dumps(kept[0]) == json.dumps(kept[1])
