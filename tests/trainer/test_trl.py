"""The mixin with TRL's Trainers, two processes each."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hf_dlion import DistributedLion, DLionArgumentsMixin, DLionTrainerMixin
from tests.harness import run_workers
from tests.trainer.tiny import act_as_launched
from tests.trainer.tiny_llama import counting, model, tokenizer

pytest.importorskip("trl", reason="TRL is not installed: pip install 'hf-dlion[trl]'")


def settings(folder: str, optim: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "optim": optim,
        "learning_rate": 3e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
    }


def outcome(trainer: Any) -> tuple[torch.Tensor, list[dict[str, float]], bool]:
    trainer.train()
    weights = torch.cat([parameter.detach().reshape(-1) for parameter in trainer.model.parameters()])
    voted = isinstance(trainer.optimizer.optimizer, DistributedLion)
    return weights, trainer.state.log_history, voted


def sft(rank: int, folder: str) -> Any:
    act_as_launched(rank)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import trl

    class DLionSFTTrainer(DLionTrainerMixin, trl.SFTTrainer): ...

    @dataclass
    class DLionSFTConfig(DLionArgumentsMixin, trl.SFTConfig): ...

    rows = Dataset.from_list([{"text": counting(start)} for start in range(64)])
    args = DLionSFTConfig(**settings(folder, "dmuon_mavo"), max_length=16)
    return outcome(DLionSFTTrainer(model=f"{folder}/model", args=args, train_dataset=rows))


def dpo(rank: int, folder: str) -> Any:
    act_as_launched(rank)
    os.environ["HF_HUB_OFFLINE"] = "1"
    import trl

    class DLionDPOTrainer(DLionTrainerMixin, trl.DPOTrainer): ...

    @dataclass
    class DLionDPOConfig(DLionArgumentsMixin, trl.DPOConfig): ...

    rows = Dataset.from_list(
        [
            {"prompt": f"w{start % 40}", "chosen": f" {counting(start)}", "rejected": f" {counting(start + 7)}"}
            for start in range(64)
        ]
    )
    args = DLionDPOConfig(**settings(folder, "dlion_avg"), max_length=24)
    return outcome(DLionDPOTrainer(model=f"{folder}/model", args=args, train_dataset=rows))


def others(rank: int, folder: str) -> list[Any]:
    """KTO, rewards, GRPO and RLOO, one after the other: what each of them made of its model."""
    act_as_launched(rank)
    os.environ["HF_HUB_OFFLINE"] = "1"
    pairs = [
        {"prompt": f"w{start % 40}", "chosen": f" {counting(start)}", "rejected": f" {counting(start + 7)}"}
        for start in range(64)
    ]
    labelled = [
        {"prompt": f"w{start % 40}", "completion": f" {counting(start)}", "label": start % 2 == 0}
        for start in range(64)
    ]
    prompts = [{"prompt": f"w{start % 40}"} for start in range(64)]
    generates = {"max_completion_length": 4, "num_generations": 4}
    return [
        outcome(_mixed("KTO", folder, labelled, {"max_length": 24})),
        outcome(_mixed("Reward", folder, pairs, {"max_length": 24})),
        outcome(_mixed("GRPO", folder, prompts, generates, reward_funcs=_reward)),
        outcome(_mixed("RLOO", folder, prompts, generates, reward_funcs=_reward)),
    ]


def _mixed(name: str, folder: str, rows: list[dict[str, Any]], options: dict[str, Any], **keywords: Any) -> Any:
    """TRL's Trainer of that name with the mixin, by the name of ours."""
    import trl

    base, config = getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config")
    mixed = type(f"DLion{name}Trainer", (DLionTrainerMixin, base), {})
    arguments = dataclass(type(f"DLion{name}Config", (DLionArgumentsMixin, config), {}))
    given = arguments(**settings(f"{folder}/{name}", "dlion_mavo"), **options)
    return mixed(model=f"{folder}/model", args=given, train_dataset=Dataset.from_list(rows), **keywords)


def _reward(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


@pytest.mark.parametrize("trains", [sft, dpo])
def test_two_workers_vote(trains: Any, tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    (first, log, voted), (second, _, _) = run_workers(trains, 2, str(tmp_path))
    assert voted
    assert torch.equal(first, second)
    start = torch.cat([parameter.detach().reshape(-1) for parameter in model().parameters()])
    moved = (first - start).abs()
    assert (moved > 0).float().mean() > 0.5
    assert moved.max() <= 4 * 3e-3 + 1e-6
    steps = [entry for entry in log if "bits_sent_per_param" in entry]
    assert len(steps) == 4
    assert all(1 <= entry["bits_sent_per_param"] < 2 for entry in steps[1:])  # and what fills its last blocks


def test_the_other_trainers_vote(tmp_path: Path) -> None:
    pytest.importorskip("trl", minversion="1.16", reason="with TRL before 1.16, only SFT and DPO are tested")
    model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    for (first, log, voted), (second, _, _) in zip(*run_workers(others, 2, str(tmp_path), timeout=240), strict=True):
        assert voted
        assert torch.equal(first, second)
        steps = [entry for entry in log if "bits_sent_per_param" in entry]
        assert len(steps) == 4
        assert all(1 <= entry["bits_sent_per_param"] < 2 for entry in steps[1:])
