"""Optimizers that a script makes itself: ours are known wherever they come from, and others refused under our names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_dlion import DistributedLion, DistributedMuon, DLionTrainer, DLionTrainerMixin
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.report import run_report
from tests.harness import run_workers
from tests.trainer import tiny
from tests.trainer.test_trainer import weights

LION = (DistributedLion, {"lr": 2e-3, "betas": (0.8, 0.9), "aggregation": "avg"})
Made = tuple[type[Optimizer], dict[str, Any]]


def by_override(made: Made, model: Any, args: Any) -> DLionTrainer:
    class Own(DLionTrainer):
        def create_optimizer(self, model: Any = None) -> Optimizer:
            if self.optimizer is None:
                self.optimizer = made[0]([{"params": list(self.model.parameters())}], **made[1])
            return self.optimizer

    return Own(model=model, args=args, train_dataset=tiny.rows())


def by_getter(made: Made, model: Any, args: Any) -> DLionTrainer:
    class Own(DLionTrainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Made:
            return made

    return Own(model=model, args=args, train_dataset=tiny.rows())


def by_object(made: Made, model: Any, args: Any) -> DLionTrainer:
    optimizer = made[0](model.parameters(), **made[1])
    return DLionTrainer(model=model, args=args, train_dataset=tiny.rows(), optimizers=(optimizer, None))


def by_class(made: Made, model: Any, args: Any) -> DLionTrainer:
    return DLionTrainer(model=model, args=args, train_dataset=tiny.rows(), optimizer_cls_and_kwargs=made)


WAYS: dict[str, Callable[[Made, Any, Any], DLionTrainer]] = {
    "create_optimizer": by_override,
    "get_optimizer_cls_and_kwargs": by_getter,
    "optimizers": by_object,
    "optimizer_cls_and_kwargs": by_class,
}
DEFAULT = "adamw_torch"


def arguments(folder: str | Path, optim: str, **options: Any) -> Any:
    if optim != "plain":
        return tiny.arguments(folder, optim=optim, **options)
    given = tiny.arguments(folder, optim=DEFAULT, **options).to_dict()
    return TrainingArguments(**{name: given[name] for name in ("output_dir", "max_steps", "use_cpu", "logging_steps")})


class Alone(TrainerCallback):
    """On rank 0 only, logs what looks like a log of the Trainer's, and evaluates."""

    trainer: DLionTrainer

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            self.trainer.log({"loss": 1.0, "learning_rate": 1.0})
            with torch.no_grad():
                self.trainer.model(**{name: value[None] for name, value in tiny.rows(1)[0].items()})


def run(rank: int, folder: str, way: str, optim: str) -> tuple[torch.Tensor, list[dict[str, Any]], dict[str, Any]]:
    if dist.is_initialized():
        tiny.act_as_launched(rank)
    trainer = WAYS[way](LION, tiny.model(), arguments(folder, optim, max_steps=3, logging_steps=1))
    trainer.train()
    return weights(trainer.model), trainer.state.log_history, run_report(trainer)


def run_all(rank: int, folder: str) -> Any:
    ways = {(way, optim): run(rank, folder, way, optim) for way in WAYS for optim in ("dlion_mavo", DEFAULT)}
    return ways | {("optimizers", "plain"): run(rank, folder, "optimizers", "plain")}, *again(rank, folder)


def again(rank: int, folder: str) -> tuple[Any, ...]:
    """Resumed, with optim left at its default; trained twice; and with what only rank 0 does."""
    saving = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}

    def made(name: str, **options: Any) -> DLionTrainer:
        return by_override(LION, tiny.model(), arguments(f"{folder}/{name}", DEFAULT, **saving, **options))

    whole, first, resumed = made("whole", max_steps=4), made("run", max_steps=2), made("run", max_steps=4)
    whole.train()
    first.train()
    resumed.train(resume_from_checkpoint=True)
    alone = tiny.trainer(rank, folder, max_steps=3, logging_steps=1)
    Alone.trainer = alone
    alone.add_callback(Alone())
    logs = []
    for _ in range(2):
        alone.train()
        logs.append([entry for entry in alone.state.log_history if "bytes_sent_total" in entry])
    return weights(whole.model), weights(resumed.model), logs


def test_ours_is_known_wherever_it_comes_from(tmp_path: Path) -> None:
    (ways, whole, resumed, logs), (others, *_) = run_workers(run_all, 2, str(tmp_path))
    for way, (parameters, log, report) in ways.items():
        assert torch.equal(parameters, others[way][0]), way
        assert torch.equal(parameters, ways[way[0], DEFAULT][0]) or way[1] == "plain", way
        assert [entry["bits_sent_per_param"] < 2 for entry in log if "loss" in entry] == [True] * 3, way
        assert report["method"] == "dlion_avg", way
        assert (report["method_options"]["lr"], report["method_options"]["betas"]) == (2e-3, (0.8, 0.9)), way
    assert torch.equal(whole, resumed)
    first, second = ([entry["bytes_sent_total"] for entry in log] for log in logs)
    assert second[-1] <= first[-1]  # since train() began; the second has no handshake
    assert len(first) == len(second) == 3  # none of what rank 0 logged alone
    assert all(entry["bits_sent_per_param"] < 2 for log in logs for entry in log)


@pytest.mark.parametrize("way", WAYS)
def test_others_are_refused_under_our_names(way: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim='dlion_mavo', and an optimizer of class AdamW was given"):
        WAYS[way]((AdamW, {"lr": 1e-3}), tiny.model(), tiny.arguments(tmp_path)).train()


@pytest.mark.parametrize("way", WAYS)
def test_others_train_under_their_own_names(way: str, tmp_path: Path) -> None:
    trainer = WAYS[way]((AdamW, {"lr": 1e-3}), tiny.model(), tiny.arguments(tmp_path, optim=DEFAULT, max_steps=1))
    trainer.train()
    assert isinstance(trainer._own_optimizer(), AdamW)
    assert "bytes_sent_total" not in trainer.state.log_history[0]


@pytest.mark.parametrize("way", ["get_optimizer_cls_and_kwargs", "optimizer_cls_and_kwargs"])
def test_a_class_gets_what_it_needs_to_know(way: str, tmp_path: Path) -> None:
    """The groups of hidden matrices, and virtual workers."""
    args = tiny.arguments(tmp_path, optim="dmuon_mavo", virtual_workers=2, max_steps=1)
    trainer = WAYS[way]((DistributedMuon, {"lr": 2e-3, "tie": "zero"}), tiny.model(), args)
    trainer.train()
    optimizer = trainer._own_optimizer()
    assert len(optimizer.members) == 2
    assert {group["orthogonal"] for group in optimizer.param_groups} == {True, False}
    assert (optimizer.defaults["lr"], optimizer.members[0].tie) == (2e-3, "zero")


def test_what_sentence_transformers_does_not_upload(tmp_path: Path) -> None:
    class Parent(Trainer):
        def _checkpoint_push_skip_names(self, checkpoint_folder: str) -> set[str]:
            return {"optimizer.pt"}

    class Own(DLionTrainerMixin, Parent):
        pass

    args = tiny.arguments(
        tmp_path, optim="dlion_mavo", virtual_workers=2, max_steps=1, save_strategy="steps", save_steps=1
    )
    trainer = Own(model=tiny.model(), args=args, train_dataset=tiny.rows())
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    uploaded = {path.name for path in folder.iterdir()} - trainer._checkpoint_push_skip_names(str(folder))
    assert "model.safetensors" in uploaded
    assert not [name for name in uploaded if name.startswith(("worker_", "hf_dlion"))]


def test_the_getter_can_be_built_upon(tmp_path: Path) -> None:
    class Own(DLionTrainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Made:
            made, options = DLionTrainer.get_optimizer_cls_and_kwargs(args, model)
            return made, options | {"tie": "zero"}

    args = tiny.arguments(tmp_path, optim="dmuon_mavo")
    optimizer: Any = Own(model=tiny.model(), args=args, train_dataset=tiny.rows()).create_optimizer()
    assert (optimizer.tie, optimizer.param_groups[0]["orthogonal"]) == ("zero", True)
    adam, _ = DLionTrainer.get_optimizer_cls_and_kwargs(tiny.arguments(tmp_path, optim=DEFAULT))
    assert issubclass(adam, AdamW)


@pytest.mark.parametrize("optim", ["dlion_mavo", "dmuon_mavo", "adamw_torch"])
@pytest.mark.parametrize("key", ["params", "optimizer_dict"])
def test_groups_that_a_parent_makes_on_its_instance(optim: str, key: str, tmp_path: Path) -> None:
    """As sentence-transformers, whose losses have weights, and rates for some names."""
    extra = torch.nn.Parameter(torch.ones(3, 4))

    class Parent(Trainer):
        rate = 1e-5

        def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Made:
            made, options = super().get_optimizer_cls_and_kwargs(args, model)
            groups = [
                {"params": [extra], "lr": self.rate},
                {"params": list(self.model.parameters()), "weight_decay": 0.5},
            ]
            return made, options | {key: groups}

    class Own(DLionTrainerMixin, Parent):
        pass

    args = tiny.arguments(tmp_path, optim=optim, optim_args="tie=zero" if optim != "adamw_torch" else None)
    optimizer: Any = Own(model=tiny.model(), args=args, train_dataset=tiny.rows()).create_optimizer()
    own = [group for group in optimizer.param_groups if any(one is extra for one in group["params"])]
    assert [(len(group["params"]), group["lr"]) for group in own] == [(1, 1e-5)]
    assert {group["weight_decay"] for group in optimizer.param_groups if group is not own[0]} == {0.5}
    kinds = [group.get("orthogonal") for group in optimizer.param_groups]
    assert set(kinds) == ({True, False} if optim == "dmuon_mavo" else {None})
    assert optim == "adamw_torch" or optimizer.tie == "zero"


@pytest.mark.parametrize("optim", ["dlion_mavo", DEFAULT])
def test_an_override_counts_or_is_said_not_to(optim: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of the method that makes both, which transformers 5 does not call."""

    class Own(DLionTrainer):
        def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
            self.optimizer = LION[0](self.model.parameters(), **LION[1])
            self.create_scheduler(num_training_steps)

    trainer = Own(model=tiny.model(), args=arguments(tmp_path, optim, max_steps=1), train_dataset=tiny.rows())
    trainer.train()
    counts = trainer.optimizer.param_groups[0]["betas"] == LION[1]["betas"]
    said = "Own has a create_optimizer_and_scheduler of its own, which transformers" in caplog.text
    assert counts != said


def test_virtual_workers_must_be_as_many(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, virtual_workers=3, max_steps=1, logging_steps=1)
    with pytest.raises(ValueError, match="virtual_workers=3, and an optimizer of 1 in this process"):
        by_override(LION, tiny.model(), args).train()
    virtual = (VirtualWorkers, {"workers": 3, "method": DistributedLion})
    with pytest.raises(ValueError, match="virtual_workers=1, and an optimizer of 3"):
        by_object(virtual, tiny.model(), tiny.arguments(tmp_path, optim=DEFAULT, max_steps=1)).train()
    trainer = by_object(virtual, tiny.model(), args)
    trainer.train()
    assert trainer.state.log_history[0]["bits_sent_per_param"] > 0


def test_a_model_made_anew_gets_the_optimizer_anew(tmp_path: Path) -> None:
    trainer = DLionTrainer(
        model_init=lambda: tiny.model(), args=tiny.arguments(tmp_path, max_steps=1), train_dataset=tiny.rows(),
        optimizer_cls_and_kwargs=(DistributedMuon, {"lr": 1e-3}),
    )  # fmt: skip
    for _ in range(2):
        trainer.train()
        assert isinstance(trainer._own_optimizer(), DistributedMuon)


class Unfreezing(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        frozen = [parameter for parameter in others["model"].parameters() if not parameter.requires_grad]
        if state.global_step == 2 and frozen:
            for parameter in frozen:
                parameter.requires_grad_(True)
            others["optimizer"].add_param_group({"params": frozen, "lr": 1e-3})
            others["lr_scheduler"].base_lrs.append(1e-3)
            others["lr_scheduler"].lr_lambdas.append(others["lr_scheduler"].lr_lambdas[0])


@pytest.mark.parametrize("optim", ["dlion_mavo", "dmuon_mavo", "gmuon"])
def test_a_callback_can_add_what_it_unfreezes(optim: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(0, tmp_path, optim=optim)
    embedding = trainer.model.transformer.wte.weight.requires_grad_(False)
    before = embedding.detach().clone()
    trainer.add_callback(Unfreezing())
    trainer.train()
    assert not torch.equal(embedding, before)
