"""Through the Trainer, a bad gradient is its worker's alone, and is named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback, TrainerState

from hf_dlion import DLionTrainer
from hf_dlion.optim import agreement, overlap
from hf_dlion.optim.bad_gradients import first_bad_gradient
from tests.harness import run_workers, what_is_logged
from tests.trainer import tiny
from tests.trainer.test_trainer import weights

LATE = "transformer.ln_f.weight"


def spoiled(rank: int, folder: str, bad: int | None, options: dict[str, Any]) -> tuple[torch.Tensor, float, str]:
    """A worker whose gradient of a late parameter has a NaN in the second of four steps."""
    said = what_is_logged()
    run = tiny.trainer(rank, folder, logging_steps=4, **options)
    backwards = 0

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal backwards
        backwards += 1
        turn = options.get("virtual_workers", 1)
        step, worker = (backwards - 1) // turn, rank if turn == 1 else (backwards - 1) % turn
        return (
            torch.where(torch.arange(len(gradient)) == 3, torch.nan, gradient)
            if (step, worker) == (1, bad)
            else gradient
        )

    dict(run.model.named_parameters())[LATE].register_hook(spoil)
    run.train()
    counted = [entry["bad_gradients"] for entry in run.state.log_history if "bad_gradients" in entry]
    return weights(run.model), sum(counted), " ".join(said)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("virtual", [False, True])
def test_a_worker_abstains_and_the_parameter_is_named(virtual: bool, max_grad_norm: float, tmp_path: Any) -> None:
    options = {"max_grad_norm": max_grad_norm, **({"virtual_workers": 3} if virtual else {})}
    outcomes = run_workers(spoiled, 1 if virtual else 3, str(tmp_path), 1, options)
    for parameters, counted, _ in outcomes:
        assert torch.equal(parameters, outcomes[0][0])
        assert parameters.isfinite().all()
        assert counted == 1
    *_, said = outcomes[0 if virtual else 1]
    assert "worker 1 abstains from a step: the gradient of parameter" in said
    assert f"({LATE}), shape (32,), has a NaN or Inf at step 1" in said


class SpoilsAfterClipping(DLionTrainer):
    """Puts a NaN into the gradient of one worker's second step."""

    worker: int | None = None

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)
        if self.worker is not None and self.state.global_step == 1:
            optimizer: Any = self.optimizer.optimizer
            names = [name for name, _ in self.model.named_parameters()]
            optimizer.gradients[self.worker][names.index(LATE)][3] = torch.nan
        norm.fill_(1.0)
        return norm


class Sums(TrainerCallback):
    """Adds up a gradient over the ranks, as is done for layers that are parallel otherwise: rank 0's stays as new."""

    def __init__(self, run: DLionTrainer) -> None:
        self.parameter = dict(run.model.named_parameters())[LATE]

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            if args.process_index == 1:
                self.parameter.grad[3] = torch.inf  # type: ignore[index]
            dist.all_reduce(self.parameter.grad)


def read_in_steps(rank: int, folder: str, options: dict[str, Any], sums: bool) -> tuple[list[int], float, bool]:
    """How many gradients each look for a bad one reads; how often workers abstained; whether momenta are finite."""
    run = tiny.trainer(rank, folder, logging_steps=4, **options)
    virtual = options.get("virtual_workers", 1) > 1
    if sums:
        run.add_callback(Sums(run))
    else:
        run.__class__ = SpoilsAfterClipping
        run.worker = 1 if virtual else 0 if rank == 1 else None
    read: list[int] = []

    def count(gradients: Any) -> int:
        read.append(sum(gradient is not None for gradient in gradients))
        return first_bad_gradient(gradients)

    agreement.first_bad_gradient = overlap.first_bad_gradient = count
    run.train()
    finite = all(s["momentum"].isfinite().all() for m in run.optimizer.optimizer.members for s in m.state.values())
    return read, sum(entry.get("bad_gradients", 0) for entry in run.state.log_history), bool(finite)


@pytest.mark.parametrize("max_grad_norm", [0.1, 0.0])
def test_the_norm_of_gradients_shows_that_they_are_finite(max_grad_norm: float, tmp_path: Any) -> None:
    """So they are not read for that; but one that has changed since is."""
    if not max_grad_norm and not hasattr(Trainer, "_clip_grad_norm"):
        pytest.skip("before transformers 5.3, a Trainer finds no norm without clipping")
    options = {"max_grad_norm": max_grad_norm}
    first, second = run_workers(read_in_steps, 2, str(tmp_path), options, False)
    assert first == ([0, 0, 0, 0], 1, True)
    assert second == ([0, 1, 0, 0], 1, True)
    [(read, *rest)] = run_workers(read_in_steps, 1, str(tmp_path), options | {"virtual_workers": 2}, False)
    assert (sorted(read), *rest) == ([0] * 7 + [1], 1, True)


def test_a_callback_may_change_gradients_unseen(tmp_path: Any) -> None:
    for message in run_workers(all_spoiled, 2, str(tmp_path)):
        assert message.startswith("rank 0: the gradient of parameter")


def all_spoiled(rank: int, folder: str) -> str:
    try:
        read_in_steps(rank, folder, {}, True)
    except FloatingPointError as error:
        return str(error)
    return "no error"


def test_all_stop_where_it_is_to_be_an_error(tmp_path: Any) -> None:
    for message in run_workers(stopped, 2, str(tmp_path)):
        assert message.startswith("rank 1: the gradient of parameter")
        assert f"({LATE})" in message


def stopped(rank: int, folder: str) -> str:
    try:
        spoiled(rank, folder, 1, {"on_bad_gradient": "raise"})
    except FloatingPointError as error:
        return str(error)
    return "no error"
