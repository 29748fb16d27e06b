"""DLionTrainer over real processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_dlion import DistributedLion, DLionTrainer, DLionTrainerMixin
from hf_dlion.trainer.methods import METHODS
from tests.harness import run_workers
from tests.trainer import tiny


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def train(rank: int, folder: str, options: dict[str, Any]) -> tuple[list[dict[str, float]], torch.Tensor]:
    trainer = tiny.trainer(rank, folder, **options)
    trainer.train()
    return trainer.state.log_history, weights(trainer.model)


def by_hand(aggregation: str, folder: str, accumulation: int, steps: int) -> torch.Tensor:
    """The same run in one process: each worker's gradient computed apart, and the votes written out."""
    workers, model = 2, tiny.model()
    loader = DLionTrainer(
        model=model,
        args=tiny.arguments(folder, per_device_train_batch_size=4 * workers),
        train_dataset=tiny.rows(),
    ).get_train_dataloader()
    batches = iter(loader)
    parameters = list(model.parameters())
    momenta = [[torch.zeros_like(p) for p in parameters] for _ in range(workers)]
    for step in range(steps):
        micro_batches = [next(batches) for _ in range(accumulation)]
        votes = []
        for rank in range(workers):
            model.zero_grad()
            for batch in micro_batches:
                # accelerate gives consecutive batches to consecutive ranks
                own = {name: tensor[4 * rank : 4 * rank + 4] for name, tensor in batch.items()}
                (model(**own).loss / accumulation).backward()
            votes.append([])
            for m, p in zip(momenta[rank], parameters, strict=True):
                votes[rank].append(torch.sign(0.9 * m + (1 - 0.9) * p.grad))
                m.copy_(0.99 * m + (1 - 0.99) * p.grad)
        lr = 3e-3 * (1 - step / steps)
        with torch.no_grad():
            for p, *cast in zip(parameters, *votes, strict=True):
                total = torch.stack(cast).sum(0)
                decision = torch.sign(total) if aggregation == "mavo" else total / workers
                p.sub_(lr * decision)
    return weights(model)


@pytest.mark.parametrize(("optim", "accumulation"), [("dlion_mavo", 1), ("dlion_avg", 2)])
def test_trains_as_the_formula_says(optim: str, accumulation: int, tmp_path: Path) -> None:
    options = {"optim": optim, "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.0}
    (_, first), (_, second) = run_workers(train, 2, str(tmp_path), options)
    assert torch.equal(first, second)
    expected = by_hand(optim.removeprefix("dlion_"), str(tmp_path), accumulation, steps=4)
    # DDP, accumulation and batching round differently; a sign may flip where a direction is next to zero.
    same = (first - expected).abs() < 1e-6
    assert same.float().mean() > 0.99


def test_the_log_has_the_traffic_and_the_votes(tmp_path: Path) -> None:
    (log, _), _ = run_workers(train, 2, str(tmp_path), {"logging_steps": 1})
    parameters = sum(p.numel() for p in tiny.model().parameters())
    steps = [entry for entry in log if "bits_sent_per_param" in entry]
    assert len(steps) == 4
    for number, entry in enumerate(steps[1:], 2):
        # One bit up, and the padding of two param groups to whole blocks.
        assert 1 < entry["bits_sent_per_param"] < 1.2
        assert entry["bits_received_per_param"] == entry["bits_sent_per_param"]
        assert entry["fp32_allreduce_ratio"] == pytest.approx(entry["bits_sent_per_param"] / 32, abs=1e-5)
        assert entry["vote_ties"] + entry["vote_unanimous"] == pytest.approx(1, abs=1e-5)
        assert 0.05 < entry["vote_unanimous"] < 1
        per_step = entry["bytes_sent_total"] - steps[number - 2]["bytes_sent_total"]
        assert entry["bits_sent_per_param"] == pytest.approx(8 * per_step / parameters, abs=1e-5)


def every_method(rank: int, folder: str) -> dict[str, tuple[list[dict[str, float]], torch.Tensor]]:
    return {name: train(rank, folder, {"optim": name, "max_steps": 3, "logging_steps": 1}) for name in METHODS}


class OwnOptimizer(Trainer):
    """As scripts for older versions of transformers have it."""

    def create_optimizer(self) -> Any:
        return super().create_optimizer()


class OwnDLionTrainer(DLionTrainerMixin, OwnOptimizer):
    pass


def test_a_trainer_whose_create_optimizer_takes_no_model(tmp_path: Path) -> None:
    args = tiny.arguments(tmp_path, max_steps=1)
    trainer = OwnDLionTrainer(model=tiny.model(), args=args, train_dataset=tiny.rows())
    trainer.train()
    assert type(trainer._own_optimizer()).__name__ == "DistributedLion"


def test_every_method_trains_by_name(tmp_path: Path) -> None:
    first, second = run_workers(every_method, 2, str(tmp_path))
    start = weights(tiny.model())
    for name in METHODS:
        log, parameters = first[name]
        assert torch.equal(parameters, second[name][1]), name
        assert not torch.equal(parameters, start), name
        assert all(entry["bytes_sent_total"] > 0 for entry in log if "learning_rate" in entry), name
        assert ("vote_ties" in log[0]) == name.startswith(("dlion", "dsignum", "dmuon")), name


class NormTrainer(DLionTrainer):
    """Notes each rank's own gradient norm."""

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        self.own_norm = float(super()._get_grad_norm(model, grad_norm))
        return self.own_norm


def norms(rank: int, folder: str) -> tuple[float, float]:
    tiny.act_as_launched(rank)
    args = tiny.arguments(folder, max_steps=1, logging_steps=1)
    trainer = NormTrainer(model=tiny.model(), args=args, train_dataset=tiny.rows())
    trainer.train()
    return trainer.own_norm, trainer.state.log_history[0]["grad_norm"]


def test_the_logged_norm_is_the_mean_over_workers(tmp_path: Path) -> None:
    (first, logged), (second, _) = run_workers(norms, 2, str(tmp_path))
    assert first != second
    assert logged == pytest.approx((first + second) / 2, rel=1e-4)


def test_learns_and_keeps_replicas_equal(tmp_path: Path) -> None:
    options = {"max_steps": 40, "logging_steps": 20, "weight_decay": 0.1, "bf16": True}
    (log, first), (_, second) = run_workers(train, 2, str(tmp_path), options)
    assert torch.equal(first, second)
    assert log[1]["loss"] < log[0]["loss"] - 0.3


def plain_and_ours(rank: int, folder: str) -> None:
    results = []
    for kind in (Trainer, DLionTrainer):
        tiny.act_as_launched(rank)
        args = tiny.arguments(folder, optim="adamw_torch")
        trainer = kind(model=tiny.model(), args=args, train_dataset=tiny.rows())
        trainer.train()
        assert "bits_sent_per_param" not in trainer.state.log_history[0]
        results.append(weights(trainer.model))
    assert torch.equal(*results)


def test_optimizers_of_transformers_train_as_ever(tmp_path: Path) -> None:
    run_workers(plain_and_ours, 2, str(tmp_path))


def test_one_process_is_lion(tmp_path: Path) -> None:
    trainer = tiny.trainer(0, tmp_path, weight_decay=0.1, lion_beta1=0.8, lion_beta2=0.95, max_steps=2)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, DistributedLion)
    assert optimizer.workers == 1
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.95)
    assert trainer.state.log_history[0]["bytes_sent_total"] == 0


def test_several_gpus_in_one_process_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = tiny.arguments(tmp_path)
    monkeypatch.setattr(type(args), "n_gpu", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch --multi_gpu"):
        DLionTrainer(model=tiny.model(), args=args, train_dataset=tiny.rows())


def test_the_mixin_serves_other_trainers(tmp_path: Path) -> None:
    class Counting(Trainer):
        steps = 0

        def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
            self.steps += 1
            return super().training_step(*args, **options)

    class DLionCounting(DLionTrainerMixin, Counting):
        pass

    trainer = DLionCounting(model=tiny.model(), args=tiny.arguments(tmp_path), train_dataset=tiny.rows())
    trainer.train()
    assert trainer.steps == 4
    assert isinstance(trainer.optimizer.optimizer, DistributedLion)
