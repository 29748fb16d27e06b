"""Which rows a virtual worker gets: bit for bit those of a process, at the end of an epoch too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import IterableDataset

from hf_dlion import DLionTrainer
from tests.harness import run_workers
from tests.trainer import tiny
from tests.trainer.test_trainer import weights

WORKERS = 3


class Stream(IterableDataset):
    """Rows in order, without a length."""

    def __init__(self, count: int) -> None:
        self.rows = tiny.rows(count)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self.rows


class SizedStream(Stream):
    def __len__(self) -> int:
        return len(self.rows)


class ShuffledStream(Stream):
    """In another order in each epoch, from a generator that accelerate keeps alike on all ranks."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.generator = torch.Generator()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for index in torch.randperm(len(self.rows), generator=self.generator).tolist():
            yield self.rows[index]


def sharded(count: int) -> datasets.IterableDataset:
    rows = [{name: column.tolist() for name, column in row.items()} for row in tiny.rows(count)]
    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=WORKERS).with_format("torch")


DATA = {
    "rows": tiny.rows,
    "stream": Stream,
    "sized": SizedStream,
    "shuffled": ShuffledStream,
    "sharded": sharded,
}
APART = {"accelerator_config": {"dispatch_batches": False}}

# What the data is, how many rows, and options. Batches are of 2 rows, so 12 rows make two rounds of three workers.
CASES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "whole rounds": ("rows", 12, {}),
    "a batch too many": ("rows", 14, {}),
    "a row too many": ("rows", 13, {}),
    "a batch too few": ("rows", 16, {"num_train_epochs": 3}),
    "left out": ("rows", 16, {"dataloader_drop_last": True, "num_train_epochs": 2}),
    "accumulated": ("rows", 20, {"gradient_accumulation_steps": 2, "num_train_epochs": 2}),
    "accumulated, left out": ("rows", 23, {"gradient_accumulation_steps": 3, "dataloader_drop_last": True}),
    "fewer batches than workers": ("rows", 3, {"num_train_epochs": 2}),
    "one row": ("rows", 1, {"num_train_epochs": 2}),
    "fewer, to a number of steps": ("rows", 5, {"max_steps": 5, "gradient_accumulation_steps": 2}),
    "unclipped": ("rows", 14, {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2}),
    "split": ("rows", 13, {"per_device_train_batch_size": 6, "accelerator_config": {"split_batches": True}}),
    "dispatched": ("rows", 13, {"accelerator_config": {"dispatch_batches": True}}),
    "dispatched, left out": (
        "rows",
        13,
        {"accelerator_config": {"dispatch_batches": True}, "dataloader_drop_last": True},
    ),
    "torch's sampler": ("rows", 14, {"num_train_epochs": 2, "accelerator_config": {"use_seedable_sampler": False}}),
    "several loaders": ("rows", 13, {"dataloader_num_workers": 1}),
    "stream": ("stream", 16, {"max_steps": 7}),
    "stream, accumulated": ("stream", 16, {"max_steps": 5, "gradient_accumulation_steps": 2}),
    "stream of a row too many": ("stream", 13, {"max_steps": 5}),
    "stream of few rows": ("stream", 2, {"max_steps": 3}),
    "stream with a length": ("sized", 16, {"num_train_epochs": 2}),
    "split stream": (
        "sized",
        13,
        {"per_device_train_batch_size": 6, "accelerator_config": {"split_batches": True}, "num_train_epochs": 2},
    ),
    "stream, read by each": ("stream", 16, {"max_steps": 7, **APART}),
    "shuffled stream": ("shuffled", 13, {"max_steps": 5}),
    "shuffled stream, read by each": ("shuffled", 13, {"max_steps": 5, **APART}),
    "shards": ("sharded", 18, {"max_steps": 5, **APART}),
}


def train(rank: int, folder: str, case: str, **more: Any) -> tuple[torch.Tensor, int, list[Any]]:
    kind, count, options = CASES[case]
    if dist.is_initialized():
        tiny.act_as_launched(rank)
    settings = {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 2, "logging_steps": 1}
    args = tiny.arguments(folder, **(settings | options | more))
    trainer = DLionTrainer(model=tiny.model(), args=args, train_dataset=DATA[kind](count))
    try:
        trainer.train()
    except (RuntimeError, ValueError) as error:  # the same data for all, say
        return weights(trainer.model), trainer.state.global_step, [str(error)]
    log = [(entry["step"], entry["epoch"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return weights(trainer.model), trainer.state.global_step, log


def train_all(rank: int, folder: str) -> dict[str, tuple[torch.Tensor, int, list[Any]]]:
    return {case: train(rank, folder, case) for case in CASES}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, int, list[Any]]]:
    folder = str(tmp_path_factory.mktemp("processes"))
    return run_workers(train_all, WORKERS, folder, timeout=240)[0]


@pytest.mark.parametrize("case", CASES)
def test_bitwise_what_processes_train(case: str, processes: Any, tmp_path: Path) -> None:
    expected, steps, their_log = processes[case]
    found, made, log = train(0, str(tmp_path), case, virtual_workers=WORKERS)
    assert made == steps
    assert torch.equal(found, expected)
    if case == "one row":
        assert "every worker was given the same data" in log[0]
        assert log == their_log
        return
    for entry, theirs in zip(log, their_log, strict=True):
        assert entry == pytest.approx(theirs, rel=1e-5)
