"""NCCL between processes that share a GPU, which it allows from 2.30 on.

Where torch brings an older one, LD_PRELOAD can give it `nvidia/nccl/lib/libnccl.so.2` of another nvidia-nccl-cu13.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_dlion import vote_gradients
from hf_dlion.wire.collectives import ProcessChannel
from hf_dlion.wire.ledger import Ledger
from tests import test_gradient_votes as hooked
from tests.gpu import test_groups as groups
from tests.gpu import test_overlap as early
from tests.gpu import test_votes as votes
from tests.gpu.device import DEVICE, run
from tests.gpu.test_training import waits
from tests.optim import test_overlap as overlap


def shares_a_gpu() -> bool:
    """What is loaded is asked: torch knows which NCCL it was compiled with."""
    if DEVICE == "cpu":
        return True
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libnccl.so.2").ncclGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return False
    return version.value >= 23000


pytestmark = pytest.mark.skipif(
    not shares_a_gpu(), reason="needs NCCL 2.30, of which several processes can share a GPU"
)


def joined(rank: int, folder: str, function: Callable[..., Any], *args: Any) -> Any:
    """``function(rank, *args)`` in a group that has GPUs' tensors by NCCL, and those of CPUs by gloo."""
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    workers = dist.get_world_size()
    dist.barrier()  # nobody is still joining the group that ends here
    dist.destroy_process_group()
    backends = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backends, init_method=f"file://{folder}/meeting", rank=rank, world_size=workers)
    assert not ProcessChannel(None, Ledger())._by_way_of_host(torch.device(DEVICE))
    return function(rank, *args)


@pytest.mark.parametrize("workers", [2, 3])
def test_votes_are_the_reference(tmp_path: Path, workers: int) -> None:
    run(joined, workers, str(tmp_path), votes.follow_reference, workers, votes.ON_GPUS[-1], votes.CASES, timeout=200)


@pytest.mark.parametrize("workers", [2, 3])
def test_early_votes_end_in_the_same_bits(tmp_path: Path, workers: int) -> None:
    asked = {"overlap": True}
    cases: list[overlap.Case] = [(make, overlap.nothing, 1, options | asked) for make, options in overlap.METHODS]
    # Of two communicators NCCL promises no progress at once: at a script's own collectives the ranks hung.
    cases += [(overlap.lion, event, 1, asked) for event in overlap.EVENTS if event is not overlap.gathered]
    found = [case for rank in run(joined, workers, str(tmp_path), early.both_ways, cases, timeout=200) for case in rank]
    assert not [name for name, same, _ in found if not same]
    assert not [(name, sent) for name, _, sent in found if sent <= 10]


def test_ddp_with_local_gradients(tmp_path: Path) -> None:
    first, second = run(joined, 2, str(tmp_path), groups.trained)
    assert torch.equal(first, second)


def test_votes_on_gradients(tmp_path: Path) -> None:
    run(joined, 2, str(tmp_path), groups.voted)


def late(rank: int) -> tuple[int, list[bool]]:
    """In several buckets: how often a step of votes on gradients waits for the GPU, and what a bad gradient does."""
    model = hooked.Model().to(DEVICE)
    module = DistributedDataParallel(model, bucket_cap_mb=1e-5)
    votes = vote_gradients(module, dither=False)
    assert votes is not None

    given = [one.to(DEVICE) for one in hooked.gradients(rank, 0) if one is not None]
    given[4][5, 6] = 0.0

    def step() -> None:
        model.zero_grad()
        module(given).backward()

    counted = sum(count for where, count in waits(step).items() if "optim/" in where)
    votes.step = 0
    if rank == 1:
        given[4][5, 6] = torch.inf
    step()
    assert votes.bad_gradients == 1
    by_all = hooked.expected([0, 1], 0, "avg", False, torch.float32)[:4]
    gradients = [hooked.flat(weight.grad).cpu() for weight in model.weights if weight.grad is not None]
    own = hooked.flat(hooked.gradients(0, 0)[4])  # type: ignore[arg-type]
    own[5 * 1601 + 6] = 0.0
    signs = torch.where(own == 0, torch.where(torch.arange(len(own)) % 2 == 1, 1.0, -1.0), own.sign())
    return counted, list(map(torch.equal, gradients, [*by_all, signs]))


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is never waited for")
def test_votes_on_gradients_wait_once_a_step(tmp_path: Path) -> None:
    for counted, same in run(joined, 2, str(tmp_path), late):
        assert counted == 1
        assert same == [True] * 5
