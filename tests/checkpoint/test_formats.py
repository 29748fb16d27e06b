"""Checkpoints that earlier versions wrote, kept here as they were written."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hf_dlion import load_workers
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.methods import METHODS
from tests.harness import run_workers

FORMAT_1 = Path(__file__).parent / "format_1"
"""Two workers, after three steps; ``after.safetensors`` has the parameters that the same code had after six."""


def parameters(folder: Path, when: str) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(tensor) for _, tensor in sorted(load_file(folder / f"{when}.safetensors").items())]


def give_gradients(params: list[torch.nn.Parameter], rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def resumed_by_a_process(rank: int, name: str) -> None:
    folder = FORMAT_1 / name
    params = parameters(folder, "before")
    optimizer: Any = METHODS[name].optimizer(params, lr=1.0, **METHODS[name].fixed)
    load_workers(folder, optimizer)
    for step in range(3, 6):
        give_gradients(params, rank, step)
        optimizer.step()
    assert all(map(torch.equal, params, parameters(folder, "after")))


@pytest.mark.parametrize("name", ["dlion_mavo", "dgc"])
def test_a_checkpoint_of_format_1_resumes_bit_for_bit(name: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = FORMAT_1 / name
    params = parameters(folder, "before")
    optimizer = VirtualWorkers(params, 2, METHODS[name].optimizer, lr=1.0, **METHODS[name].fixed)
    with caplog.at_level(logging.WARNING):
        load_workers(folder, optimizer)
    assert caplog.text == ""
    for step in range(3, 6):
        for rank in range(2):
            give_gradients(params, rank, step)
            optimizer.next_worker()
        optimizer.step()
    assert all(map(torch.equal, params, parameters(folder, "after")))
    run_workers(resumed_by_a_process, 2, name)
