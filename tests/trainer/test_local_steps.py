"""Local steps in the Trainer: over processes and virtual workers, resumed inside a round, and what is saved."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.optim import AdamW
from transformers import TrainerCallback

from hf_dlion import DistributedLion, DLionTrainer, LocalSteps
from hf_dlion.trainer.report import run_report
from tests.harness import run_workers
from tests.trainer import tiny
from tests.trainer.test_trainer import weights
from tests.trainer.test_virtual_workers import train

LOCAL = {
    "local_steps": 4,
    "max_steps": 10,
    "learning_rate": 1e-2,
    "logging_steps": 5,
    "eval_strategy": "steps",
    "eval_steps": 3,
}


def train_all(rank: int, folder: str, variants: list[dict[str, Any]]) -> list[Any]:
    return [train(rank, f"{folder}/{index}", LOCAL | own) for index, own in enumerate(variants)]


def test_bitwise_what_processes_train(tmp_path: Path) -> None:
    variants: list[dict[str, Any]] = [
        {"optim": "gmuon", "gradient_accumulation_steps": 2},
        {"optim": "adamw_torch", "outer_aggregation": "mean"},
        {"optim": "dmuon_mavo", "outer_aggregation": "avg", "local_steps": 1, "outer_momentum": 0.0},
        {"optim": "dlion_mavo", "bf16": True, "vote_tie": "zero", "vote_exchange": "gather"},
        {"optim": "gmuon", "local_fragments": 2, "local_delay": 1},
    ]
    processes = run_workers(train_all, 2, str(tmp_path), variants)
    for index, own in enumerate(variants):
        log, ours, report = train(0, str(tmp_path / "virtual"), LOCAL | own | {"virtual_workers": 2})
        for rank in range(2):
            _, theirs, expected = processes[rank][index]
            assert torch.equal(ours, theirs), own
            for key in ("workers", "bytes_sent", "bytes_fp32_allreduce", "bytes_counted_steps", "method_options"):
                assert report[key] == expected[key], (own, key)
        for entry, reference in zip(log, processes[0][index][0], strict=True):
            figures = {
                key: value for key, value in reference.items() if not key.startswith("eval_") or key == "eval_loss"
            }
            assert {key: entry[key] for key in figures} == pytest.approx(figures, rel=1e-5), own
        assert report["method"] == own["optim"]
        assert report["method_options"]["local_steps"] == own.get("local_steps", 4)
        assert log[-1]["step"] == 10
    shares = [entry for entry in processes[0][0][0] if "vote_unanimous" in entry]
    assert all(0 < entry["vote_unanimous"] < 1 for entry in shares)
    assert processes[0][0][0][-1].keys() == processes[0][1][0][-1].keys()


class Watch(TrainerCallback):
    """Notes the weights after every step, and at every evaluation."""

    def __init__(self) -> None:
        self.steps: list[torch.Tensor] = []
        self.evaluated: dict[int, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.steps.append(weights(model))

    def on_prediction_step(self, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        self.evaluated[state.global_step] = weights(model)


def watched(rank: int, folder: str, options: dict[str, Any]) -> Any:
    """The weights of every step, those evaluated, those saved, and those at the end."""
    run = tiny.trainer(rank, folder, **LOCAL | {"save_strategy": "steps", "save_steps": 3} | options)
    watch = Watch()
    run.add_callback(watch)
    run.train()
    run.save_model(folder)
    found = {} if rank else {int(path.parent.name.split("-")[1]): path for path in Path(folder).glob("c*/model.s*")}
    saved = {step: saved_weights(run, path) for step, path in found.items()}
    end = None if rank else saved_weights(run, Path(folder, "model.safetensors"))  # which rank 0 has written
    return watch.steps, watch.evaluated, saved, end, weights(run.model)


def saved_weights(run: DLionTrainer, path: Path) -> torch.Tensor:
    found = load_file(path)
    names = [name for name, _ in run.accelerator.unwrap_model(run.model).named_parameters()]
    return torch.cat([found[name].flatten() for name in names])


@pytest.mark.parametrize("virtual", [False, True])
def test_what_is_evaluated_and_saved_is_what_was_voted(virtual: bool, tmp_path: Path) -> None:
    """Votes are at steps 4 and 8, and after the last one."""
    if virtual:
        outcomes = [watched(0, str(tmp_path), {"virtual_workers": 2, "optim": "gmuon"})]
    else:
        outcomes = run_workers(watched, 2, str(tmp_path), {"optim": "gmuon"})
    steps, evaluated, saved, saved_at_end, end = outcomes[0]
    for step, voted in {3: weights(tiny.model()), 6: steps[3], 9: steps[7]}.items():
        assert torch.equal(evaluated[step], voted), step
        assert torch.equal(saved[step], voted), step
        assert not torch.equal(steps[step - 1], voted), step
    assert torch.equal(saved_at_end, end)
    assert not torch.equal(steps[9], end)
    for other, *_, theirs in outcomes[1:]:
        assert torch.equal(theirs, end)
        assert torch.equal(other[3], steps[3])
        assert not torch.equal(other[2], steps[2])


def stop_and_go_on(rank: int, folder: str, options: dict[str, Any]) -> list[torch.Tensor]:
    """The weights of the last steps: of a run that is not stopped, and of one that goes on from step 6."""
    found = []
    schedule = {"max_steps": 10, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 8}
    for part, more in (("whole", {}), ("parts", {}), ("parts", {"resume": True})):
        saving = {"save_strategy": "steps", "save_steps": 6} if part == "parts" else {}
        run = tiny.trainer(rank, f"{folder}/{part}", **LOCAL | schedule | saving | options)
        watch = Watch()
        run.add_callback(watch)
        run.train(resume_from_checkpoint=f"{folder}/parts/checkpoint-6" if more else None)
        found.append(torch.stack([*watch.steps[-4:], weights(run.model)]))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "gmuon", "virtual_workers": 3},
        {"optim": "dlion_avg", "virtual_workers": 2, "bf16": True, "outer_aggregation": "mean"},
        {"optim": "gmuon", "virtual_workers": 2, "local_delay": 3},
    ],
)
def test_resumed_in_a_round_is_as_never_stopped(options: dict[str, Any], tmp_path: Path) -> None:
    whole, _, again = stop_and_go_on(0, str(tmp_path), options)
    assert torch.equal(whole, again)


def test_resumed_in_processes_is_as_never_stopped(tmp_path: Path) -> None:
    outcomes = run_workers(stop_and_go_on, 2, str(tmp_path), {"optim": "adamw_torch"})
    for whole, _, again in outcomes:
        assert torch.equal(whole, again)
    assert not torch.equal(outcomes[0][0][0], outcomes[1][0][0])


@pytest.mark.parametrize("policy", ["mean", "reset"])
def test_resumed_with_another_number_of_workers(policy: str, tmp_path: Path) -> None:
    options = LOCAL | {"optim": "gmuon", "save_strategy": "steps", "save_steps": 6, "resume_world_size_policy": policy}
    tiny.trainer(0, tmp_path, **options, virtual_workers=3).train()
    run = tiny.trainer(0, tmp_path, **options, virtual_workers=2)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert run.state.global_step == 10
    assert weights(run.model).isfinite().all()


def test_an_optimizer_of_one_s_own(tmp_path: Path) -> None:
    """A foreign one is taken for the inner one, and local steps that it has are its own."""
    found = []
    for made in (
        lambda model: AdamW(model.parameters(), lr=1e-2),
        lambda model: LocalSteps(AdamW(model.parameters(), lr=1e-2), every=4),
    ):
        model = tiny.model()
        args = tiny.arguments(tmp_path, optim="adamw_torch", **LOCAL)
        run = DLionTrainer(
            model=model, args=args, train_dataset=tiny.rows(), eval_dataset=tiny.rows(8), optimizers=(made(model), None)
        )
        run.train()
        found.append(weights(run.model))
        assert run_report(run)["method_options"]["local_steps"] == 4
    assert torch.equal(*found)


def test_the_card_and_the_report_say_it(tmp_path: Path) -> None:
    run = tiny.trainer(0, tmp_path, **LOCAL | {"optim": "gmuon", "virtual_workers": 2, "local_delay": 2})
    run.train()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert '`optim="gmuon"` and `local_steps=4` of hf_dlion' in card
    assert "every 4 steps they vote on how far they have come" in card
    for name, value in {
        "local_steps": 4,
        "outer_learning_rate": 1.0,
        "local_delay": 2,
        "outer_aggregation": "mavo",
    }.items():
        assert f"| `{name}` | `{value}` |" in card
        assert run_report(run)["method_options"][name] == value


def refused_optimizer(made: Any, folder: Path) -> None:
    model = tiny.model()
    args = tiny.arguments(folder, optim="adamw_torch", **LOCAL)

    class Own(DLionTrainer):
        def create_optimizer(self, model: Any = None) -> Any:
            self.optimizer = made(self.model.parameters())
            return self.optimizer

    Own(model=model, args=args, train_dataset=tiny.rows(), eval_dataset=tiny.rows(8)).train()


@pytest.mark.parametrize("made", [DistributedLion, AdamW])
def test_an_optimizer_without_local_steps_is_refused(made: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"local_steps=4, and an optimizer of class {made.__name__}.*LocalSteps"):
        refused_optimizer(made, tmp_path)


def begun_again_in_a_round(rank: int, folder: str, options: dict[str, Any]) -> torch.Tensor:
    """The weights after a training that begins again after 2 steps, as there was no memory for more."""

    class Failing(TrainerCallback):
        failed = False

        def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            if state.global_step == 2 and not self.failed:
                self.failed = True
                raise RuntimeError("CUDA out of memory. Tried to allocate")

    options = {"optim": "gmuon", "local_steps": 4, "max_steps": 3, "auto_find_batch_size": True, **options}
    run = tiny.trainer(rank, folder, **options)
    run.add_callback(Failing())
    run.train()
    return weights(run.model)


def test_a_round_ends_before_training_begins_again(tmp_path: Path) -> None:
    theirs = run_workers(begun_again_in_a_round, 2, str(tmp_path), {})
    assert torch.equal(begun_again_in_a_round(0, str(tmp_path), {"virtual_workers": 2}), theirs[0])


def test_copies_of_what_is_trained_are_not_taken_for_frozen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        tiny.trainer(0, tmp_path, optim="gmuon", local_steps=2, virtual_workers=3).train()
    assert "require no gradient" not in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"local_steps": -1}, "local_steps=-1: it is a number of steps"),
        ({"local_steps": 0, "outer_momentum": 0.5}, "outer_momentum=0.5 without local_steps would change nothing"),
        ({"local_steps": 0, "local_delay": 1}, "local_delay=1 without local_steps would change nothing"),
        ({"local_steps": 4, "outer_aggregation": "median"}, "outer_aggregation='median'.*'mean'"),
        ({"local_steps": 4, "optim": "lomo"}, "local_steps=4 with optim='lomo'.*steps during backward"),
        ({"local_steps": 4, "optim": "schedule_free_adamw"}, "schedule_free_adamw'.*others for training"),
        ({"local_steps": 4, "virtual_workers": 2, "fp16": True}, "fp16 with virtual_workers=2"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        tiny.arguments(tmp_path, **options)
