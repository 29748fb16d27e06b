"""LionTheoryCallback on quadratics, whose constrained solution is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import SequentialSampler
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_dlion import DistributedLion, DLionTrainer, LionTheoryCallback
from hf_dlion.optim.gadamw import GlobalAdamW
from hf_dlion.optim.glion import GlobalLion
from hf_dlion.optim.signum import DistributedSignum
from tests.harness import run_workers
from tests.trainer import tiny

DECAY, RATE, STEPS = 0.5, 0.3, 160
CURVATURE = torch.tensor([1.0, 0.5, 2.0, 1.0, 0.3, 1.5])
OPTIMUM = torch.tensor([5.0, -7.0, 0.5, -1.2, 1.9, 0.0])
BOX = 1 / DECAY  # the first two optima are outside, the others inside
START = torch.tensor([-40.0, -30.0, 20.0, 10.0, -3.0, 1.0])

Log = list[dict[str, float]]


class Quadratic(nn.Module):
    """0.5 * sum of a * (x - b)^2, of ``decayed``, and of ``bias``, which transformers does not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.decayed = nn.Parameter(START.clone())
        self.bias = nn.Parameter(START / 10)

    def forward(self, target: Tensor) -> dict[str, Tensor]:
        errors = torch.cat([self.decayed - target, self.bias - target], 1)
        return {"loss": 0.5 * (CURVATURE.repeat(2) * errors**2).sum(1).mean()}


def rows(workers: int) -> list[dict[str, Tensor]]:
    """A row a worker and step. At every step the workers' mean is the optimum; so is a worker's own, over the steps."""
    offsets = torch.linspace(-0.1, 0.1, workers) if workers > 1 else torch.zeros(1)
    places = [(rank + step) % workers for step in range(STEPS) for rank in range(workers)]
    return [{"target": OPTIMUM + offsets[place]} for place in places]


class InOrder(DLionTrainer):
    """Takes the rows as they come; transformers has an option for it only from 5.2 on."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def train(rank: int, folder: str | Path, every: int = 1, **options: Any) -> tuple[Log, Quadratic]:
    if dist.is_initialized():
        tiny.act_as_launched(rank)
    settings: dict[str, Any] = {
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "lion_beta1": 0.8,
        "lion_beta2": 0.9,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 1,
        "logging_steps": 1,
    }
    trainer = InOrder(
        model=Quadratic(),
        args=tiny.arguments(folder, **(settings | options)),
        train_dataset=rows(dist.get_world_size() if dist.is_initialized() else options.get("virtual_workers", 1)),
        callbacks=[LionTheoryCallback(every)],
    )
    trainer.train()
    return trainer.state.log_history, trainer.model


def observed(log: Log) -> Log:
    return [entry for entry in log if "lion_box_distance" in entry]


def observations(log: Log) -> list[tuple[float, float]]:
    return [(entry["lion_box_distance"], entry["lion_surrogate"]) for entry in observed(log)]


def check_solved(log: Log, model: Quadratic) -> None:
    seen = observed(log)
    assert [entry["step"] for entry in seen] == list(range(1, STEPS + 1))
    distances = [entry["lion_box_distance"] for entry in seen]
    assert distances[0] == pytest.approx((START * DECAY).abs().sub(1).relu().norm().item())
    for before, after, entry in zip(distances, distances[1:], seen, strict=False):
        # Rounding: of the distance, and of lambda * x where it comes close to 1.
        assert after <= (1 - entry["learning_rate"] * DECAY) * before + 1e-6 * before + 1e-6
    surrogates = [entry["lion_surrogate"] for entry in seen]
    assert distances[-1] < 1e-6
    assert surrogates[0] > 100
    assert -0.1 < surrogates[-1] < 0.1
    assert model.decayed.tolist() == pytest.approx(OPTIMUM.clamp(-BOX, BOX).tolist(), abs=0.02)
    assert model.bias.tolist() == pytest.approx(OPTIMUM.tolist(), abs=0.02)


def test_one_worker_solves_the_constrained_problem(tmp_path: Path) -> None:
    check_solved(*train(0, tmp_path))


def solve(rank: int, folder: str, methods: tuple[str, ...]) -> list[tuple[Log, Quadratic]]:
    return [train(rank, folder, optim=method) for method in methods]


@pytest.mark.parametrize(("workers", "methods"), [(2, ("dlion_mavo", "dlion_avg")), (3, ("dlion_mavo", "glion"))])
def test_workers_solve_the_constrained_problem(workers: int, methods: tuple[str, ...], tmp_path: Path) -> None:
    first, *others = run_workers(solve, workers, str(tmp_path), methods)
    for number, (log, model) in enumerate(first):
        check_solved(log, model)
        for other in others:
            assert observations(other[number][0]) == observations(log)


def test_virtual_workers_see_what_processes_see(tmp_path: Path) -> None:
    ((log, model),), *_ = run_workers(solve, 2, str(tmp_path), ("dlion_mavo",))
    virtual, same = train(0, tmp_path, virtual_workers=2)
    assert observations(virtual) == observations(log)
    assert torch.equal(same.decayed, model.decayed)


def test_the_interval(tmp_path: Path) -> None:
    log, _ = train(0, tmp_path, every=3, max_steps=8)
    everything, _ = train(0, tmp_path, max_steps=8)
    assert [entry["step"] for entry in observed(log)] == [3, 6]
    assert observations(log) == [observations(everything)[2], observations(everything)[5]]


def test_a_log_has_the_last_observation(tmp_path: Path) -> None:
    log, _ = train(0, tmp_path, every=3, max_steps=8, logging_steps=7)
    everything, _ = train(0, tmp_path, max_steps=8)
    assert [entry["step"] for entry in observed(log)] == [7]
    assert observations(log) == [observations(everything)[5]]


def observe(callback: LionTheoryCallback, optimizer: Optimizer, step: int = 0) -> dict[str, float]:
    callback.on_pre_optimizer_step(
        TrainingArguments("unused"), TrainerState(global_step=step), TrainerControl(), optimizer=optimizer
    )
    return callback.observations()


def by_hand(rank: int) -> tuple[dict[str, float], float]:
    """Parameters with decays 0.5, 0.25 and 0, of which rank 0 has no gradient for the second; and the bytes counted."""
    x, y, z = (nn.Parameter(torch.tensor(values)) for values in ([[4.0, -1.0], [6.0, 2.0]], [-8.0], [100.0]))
    optimizer = DistributedLion(
        [{"params": [x], "weight_decay": 0.5}, {"params": [y], "weight_decay": 0.25}, {"params": [z]}], lr=0.1
    )
    # The workers' signs differ where the mean's counts: means [[1, -2], [0, 2]], [3], [-0.5].
    x.grad = torch.tensor([[[5.0, -1.0], [2.0, 2.0]], [[-3.0, -3.0], [-2.0, 2.0]]])[rank].T.contiguous().T
    y.grad = None if rank == 0 else torch.tensor([6.0])
    z.grad = torch.tensor([[-4.0], [3.0]])[rank]
    own = x.grad.clone()
    found = observe(LionTheoryCallback(1), optimizer)
    assert torch.equal(x.grad, own)
    return found, optimizer.ledger.sent_bytes


def test_the_values_of_one_step() -> None:
    outcomes = run_workers(by_hand, 2)
    # lambda * x = [[2, -0.5], [3, 1]], [-2], [0]: outside by 1, 2 and 1
    # S: 1 * (1 + 2), -2 * (-1 - 0.5), 0, 2 * (1 + 1); 3 * (1 - 2); -0.5 * -1
    expected = {"lion_box_distance": 6**0.5, "lion_surrogate": 3 + 3 + 0 + 4 - 3 + 0.5}
    for found, counted in outcomes:
        assert found == pytest.approx(expected, rel=1e-7)
        assert counted == 0


@pytest.mark.parametrize("method", [DistributedLion, GlobalLion, DistributedSignum])
def test_any_lion(method: Any) -> None:
    x = nn.Parameter(torch.tensor([3.0, -2.0], dtype=torch.bfloat16))
    x.grad = torch.tensor([0.5, 0.5], dtype=torch.bfloat16)
    callback = LionTheoryCallback(2)
    optimizer = method([x], weight_decay=1.0)
    callback.on_train_begin(TrainingArguments("unused"), TrainerState(), TrainerControl(), optimizer=optimizer)
    assert observe(callback, optimizer, step=0) == {}
    assert observe(callback, optimizer, step=1) == {"lion_box_distance": 5**0.5, "lion_surrogate": 2 - 0.5}
    assert callback.observations() == {}


@pytest.mark.parametrize("optim", ["gadamw", "adamw_torch"])
def test_another_optimizer_is_refused(optim: str, tmp_path: Path) -> None:
    name = {"gadamw": GlobalAdamW, "adamw_torch": torch.optim.AdamW}[optim].__name__
    names = "dlion_mavo, dlion_avg, dsignum_mavo, dsignum_avg, glion"
    with pytest.raises(ValueError, match=rf"a run of {name}, which .* one of {names}\.$"):
        train(0, tmp_path, optim=optim, max_steps=1)


def test_every_is_at_least_one() -> None:
    with pytest.raises(ValueError, match="every=0: .*at least 1"):
        LionTheoryCallback(0)
