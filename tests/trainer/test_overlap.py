"""Votes that leave during backward under the Trainer: with accumulation, and the same bits as votes after it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from hf_dlion import DistributedLion
from tests.harness import run_workers, what_is_logged
from tests.optim.test_overlap import small_buckets

from . import tiny

CASES: dict[str, dict[str, Any]] = {
    "plain": {"max_grad_norm": 0.0},
    "accumulated": {"max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "optim": "dmuon_mavo"},
    "normed": {"norm_gradients": True, "optim": "dmuon_mavo"},
    "beside averages": {"max_grad_norm": 0.0, "optim": "dmuon_mavo", "muon_rest": "average"},
    "checkpointed": {"max_grad_norm": 0.0, "gradient_checkpointing": True},
    "below the limit": {"optim": "dmuon_mavo", "max_grad_norm": 50.0},
    "clipped": {"optim": "dmuon_mavo", "max_grad_norm": 0.1},
}


def both_ways(rank: int, folder: str) -> dict[str, tuple[bool, int, list[str]]]:
    """Of each case: whether both ways end in the same bits, how many buckets left early, what was said."""
    sent, said = small_buckets(), what_is_logged("hf_dlion.optim.overlap")
    found = {}
    for name, options in CASES.items():
        del sent[:], said[:]
        ends = []
        for overlap in (True, False):
            trainer = tiny.trainer(rank, folder, max_steps=6, **options, overlap_votes=overlap)
            trainer.train()
            ends.append(torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()]))
            if overlap:
                early = len(sent)
        assert len(sent) == early
        found[name] = torch.equal(*ends), early, list(said)
    return found


def test_the_trainer_overlaps_and_changes_no_bit(tmp_path: Path) -> None:
    for rank, found in enumerate(run_workers(both_ways, 2, str(tmp_path))):
        for name, (same, early, said) in found.items():
            assert same, name
            assert (early == 0) == (name == "clipped"), (name, early)
            assert len(said) == (name == "clipped" and rank == 0)


def test_on_other_devices_gradients_are_left_alone_where_there_is_no_limit(tmp_path: Path) -> None:
    run = tiny.trainer(0, str(tmp_path))
    model = torch.nn.Linear(3, 2, device="meta")
    optimizer = DistributedLion(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    run._clip_own(model, math.inf, optimizer)
    assert [gradient._version for gradient in gradients] == [0, 0]
    run._clip_own(model, 1e9, optimizer)
    assert min(gradient._version for gradient in gradients) > 0
