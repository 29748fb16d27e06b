"""A model and data small enough to train in a test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import GPT2Config, GPT2LMHeadModel

from hf_dlion import DLionTrainer, DLionTrainingArguments

VOCABULARY, LENGTH = 50, 16


def model(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"n_layer": 1, "n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    fixed: dict[str, Any] = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "loss_type": "ForCausalLM"}
    return GPT2LMHeadModel(GPT2Config(**shape, **fixed, bos_token_id=None, eos_token_id=None))


def rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Sequences that count up by one, from a random start: something to learn."""
    starts = torch.randint(VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(1))
    tokens = (starts + torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: str | Path, **options: Any) -> DLionTrainingArguments:
    settings: dict[str, Any] = {
        "optim": "dlion_mavo",
        "learning_rate": 3e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DLionTrainingArguments(output_dir=str(folder), **(settings | options))


def act_as_launched(rank: int) -> None:
    """Set what ``accelerate launch`` sets in a worker; the process group is the harness's."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(dist.get_world_size()), MASTER_ADDR="localhost"
    )
    os.environ["MASTER_PORT"] = "0"


def trainer(rank: int, folder: str | Path, **options: Any) -> DLionTrainer:
    if dist.is_initialized():
        act_as_launched(rank)
    return DLionTrainer(model=model(), args=arguments(folder, **options), train_dataset=rows(), eval_dataset=rows(8))
