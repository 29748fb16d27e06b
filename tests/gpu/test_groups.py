"""Process groups on a GPU: what gloo and NCCL take, and votes on gradients under DDP."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from hf_dlion import DistributedLion, keep_gradients_local, vote_gradients
from hf_dlion.wire.collectives import ProcessChannel
from hf_dlion.wire.ledger import Ledger
from hf_dlion.wire.torch_versions import all_gather_single
from tests import test_gradient_votes as hooked
from tests.gpu.device import DEVICE, TIMEOUT, parameters_there, run, set_gradients
from tests.harness import what_is_logged
from tests.optim import test_dlion as dense


def gloo_by_itself(rank: int) -> dict[str, str]:
    """Each collective on the device's tensors, without our detour: whether gloo takes them, and is right."""
    mine = torch.arange(8, device=DEVICE, dtype=torch.int32) + 100 * rank
    both = torch.stack([torch.arange(8, dtype=torch.int32) + 100 * other for other in range(2)])
    swapped = both.view(2, 2, 4)[:, rank].flatten()

    def gather() -> tuple[torch.Tensor, torch.Tensor]:
        work = all_gather_single(out := mine.new_empty(16), mine, async_op=True)
        assert work is not None
        work.wait()
        return out, both.flatten()

    def gather_list() -> tuple[torch.Tensor, torch.Tensor]:
        dist.all_gather(out := [torch.empty_like(mine) for _ in range(2)], mine)
        return torch.stack(out), both

    def exchange() -> tuple[torch.Tensor, torch.Tensor]:
        dist.all_to_all_single(out := torch.empty_like(mine), mine, async_op=True).wait()
        return out, swapped

    def exchange_uneven() -> tuple[torch.Tensor, torch.Tensor]:
        out = mine.new_empty([6, 10][rank])
        dist.all_to_all_single(out, mine, [[3, 3], [5, 5]][rank], [3, 5])
        return out, torch.cat([row[[slice(0, 3), slice(3, 8)][rank]] for row in both])

    def reduce() -> tuple[torch.Tensor, torch.Tensor]:
        dist.all_reduce(out := mine.clone())
        return out, both.sum(0, dtype=torch.int32)

    def objects() -> tuple[torch.Tensor, torch.Tensor]:
        dist.all_gather_object(out := [None, None], rank)
        return torch.tensor(out), torch.arange(2)

    found = {}
    for collective in (gather, gather_list, exchange, exchange_uneven, reduce, objects):
        found[collective.__name__] = _outcome(collective)
    return found


def _outcome(collective: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> str:
    try:
        ours, expected = collective()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "right" if torch.equal(ours.cpu(), expected) else "wrong"


def test_what_gloo_takes_by_itself(record_property: Any) -> None:
    """For the record; what travels in this package does not rest on it, but DDP's own all-reduce does."""
    first, second = run(gloo_by_itself, 2, timeout=60)
    for name, outcome in first.items():
        record_property(f"gloo_{name}", outcome)
    assert first == second
    assert first["reduce"] == first["objects"] == "right"


def by_way_of_host(rank: int) -> list[str]:
    messages = what_is_logged()
    channel, device = ProcessChannel(None, Ledger()), torch.device(DEVICE, 0)
    generator = torch.Generator().manual_seed(rank)
    words = torch.randint(-(2**31), 2**31, (2, 4096), dtype=torch.int32, generator=generator)
    for _ in range(3):
        for collective in (channel.all_gather, channel.all_to_all):
            plain, work = collective(words)
            work.wait()
            ours, work = collective(words.to(DEVICE))
            work.wait()
            assert ours.device.type == DEVICE
            assert torch.equal(ours.cpu(), plain)
    lengths = [[1000, 30], [5, 0]]
    sent = list(words.view(-1)[: sum(lengths[rank])].split(lengths[rank]))
    columns = [row[rank] for row in lengths]
    expected = channel.all_to_all_uneven(sent, columns)
    ours = channel.all_to_all_uneven([part.to(DEVICE) for part in sent], columns)
    assert all(torch.equal(one.cpu(), other) for one, other in zip(ours, expected, strict=True))
    assert channel.gather_integers([rank, -1], device) == [[0, -1], [1, -1]]
    return messages


def test_gloo_has_its_tensors_from_the_host_and_says_so_once() -> None:
    first, second = run(by_way_of_host, 2)
    assert len(first) == (DEVICE == "cuda")
    assert not first or "no backend of its own for cuda" in first[0]
    assert second == []


def nccl(rank: int) -> None:
    """A group of one, and its channel."""
    dist.destroy_process_group()
    with tempfile.TemporaryDirectory() as folder:
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
        channel = ProcessChannel(None, Ledger())
        words = torch.arange(4096, dtype=torch.int32, device=DEVICE).view(1, -1)
        assert not channel._by_way_of_host(words.device)
        for collective in (channel.all_gather, channel.all_to_all):
            ours, work = collective(words)
            work.wait()
            assert torch.equal(ours.view(-1), words.view(-1))
        assert channel.gather_integers([5], words.device) == [[5]]
        assert channel.gather_objects("one") == ["one"]
        with pytest.raises(RuntimeError, match="a tensor on cpu is to be sent.*nccl for cuda only"):
            channel.all_gather(words.cpu())
        params = parameters_there(dense.parameters(torch.float32))
        optimizer = DistributedLion(params, **dense.SETTINGS)
        for step in range(3):
            set_gradients(params, dense.gradients(0, step, torch.float32))
            optimizer.step()
        dist.destroy_process_group()


@pytest.mark.skipif(DEVICE == "cpu", reason="NCCL is for GPUs")
def test_nccl_has_them_as_they_are() -> None:
    run(nccl, 1)


def voted(rank: int) -> list[float]:
    """Of votes with noise, the shares of gradients that are as the CPU's; of those without, all are."""
    workers, shares = list(range(dist.get_world_size())), []
    for aggregation, dither, exchange in itertools.product(["avg", "mavo"], [True, False], ["gather", "sharded"]):
        model = hooked.Model().to(DEVICE)
        module = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=0.02)
        vote_gradients(module, aggregation, dither=dither, exchange=exchange)
        for step in range(hooked.STEPS):
            given = [None if g is None else g.to(DEVICE) for g in hooked.gradients(rank, step)]
            module(given).backward()
            own = [None if weight.grad is None else hooked.flat(weight.grad).cpu() for weight in model.weights]
            expected = hooked.expected(workers, step, aggregation, dither, torch.float32)
            assert [one is None for one in own] == [one is None for one in expected]
            ours, theirs = (torch.cat([one for one in all_of if one is not None]) for all_of in (own, expected))
            assert dense.same_on_all_ranks(ours, len(workers)), (aggregation, dither, exchange, step)
            share = float((ours == theirs).float().mean())
            # Norms are summed in another order than on the CPU, and the noise is a multiple of them.
            assert share == 1 if not dither else share > 0.999, (aggregation, dither, exchange, step, share)
            shares.append(share)
            model.zero_grad()
    return shares


@pytest.mark.parametrize("workers", [2, 3])
def test_gradient_votes_under_ddp(workers: int, record_property: Any) -> None:
    shares = run(voted, workers)
    record_property("share_of_gradients_as_on_the_cpu", min(shares[0]))


def trained(rank: int) -> torch.Tensor:
    """A model in DDP whose gradients stay local, with bad ones on a rank."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 512), torch.nn.GELU(), torch.nn.Linear(512, 64)).to(DEVICE)
    module = DistributedDataParallel(model)
    keep_gradients_local(module)
    optimizer = DistributedLion(model.parameters(), lr=1e-3)
    generator, losses = torch.Generator().manual_seed(rank), []
    for step in range(20):
        x = torch.randn(32, 64, generator=generator).to(DEVICE)
        loss = (module(x) - x).square().mean()
        losses.append(loss.item())
        (loss * torch.nan if (rank, step) == (1, 5) else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.bad_gradients == 1
    assert losses[-1] < losses[0]
    return dense.flatten(list(model.parameters())).cpu()


def test_ddp_with_local_gradients_over_gloo() -> None:
    first, second = run(trained, 2)
    assert torch.equal(first, second)


def test_the_environment_report_knows_the_gpu() -> None:
    command = [sys.executable, "-m", "hf_dlion", "env"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    if DEVICE == "cuda":
        assert torch.cuda.get_device_name() in done.stdout
        assert "nccl" in done.stdout
