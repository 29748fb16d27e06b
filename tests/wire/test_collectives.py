"""The collectives of processes: by way of the host's memory, and right before an exit."""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_dlion.wire.collectives import ProcessChannel
from hf_dlion.wire.ledger import Ledger
from hf_dlion.wire.nodes import split_by_node
from tests.harness import run_workers

# Without drain_gloo, one run in three fails.
VOTE_AND_EXIT = """
import sys
import torch
import torch.distributed as dist
from hf_dlion.wire.collectives import ProcessChannel
from hf_dlion.wire.ledger import Ledger

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=4)
channel = ProcessChannel(None, Ledger())
for step in range(3):
    votes, work = channel.all_gather(torch.arange(4))
    work.wait()
    del votes, work
"""


class Detour(ProcessChannel):
    """As if there were a GPU, whose tensors gloo is all there is for."""

    def _by_way_of_host(self, device: torch.device) -> bool:
        return True


def everything(rank: int) -> None:
    plain, detour = ProcessChannel(None, Ledger()), Detour(None, Ledger())
    mine = torch.arange(12).view(2, 6) + 100 * rank
    lengths = [[1, 3], [2, 0]]
    for name in ("all_gather", "all_to_all"):
        (direct, works), (around, other) = getattr(plain, name)(mine), getattr(detour, name)(mine)
        works.wait()
        other.wait()
        assert torch.equal(direct, around), name
    uneven = [torch.arange(length) + 10 * rank for length in lengths[rank]]
    received = [channel.all_to_all_uneven(uneven, [row[rank] for row in lengths]) for channel in (plain, detour)]
    assert all(map(torch.equal, *received))
    assert detour.gather_integers([rank, 7], torch.device("cpu")) == [[0, 7], [1, 7]]
    assert plain.ledger.sent_bytes < detour.ledger.sent_bytes == plain.ledger.sent_bytes + 16


def beside(rank: int, nodes: bool) -> list[list[int]]:
    """Who is met in channels of their own, where a script has made groups of some ranks."""
    for ranks in ([0], [0, 2]):
        dist.new_group(ranks)
    channel = ProcessChannel(None, Ledger())
    device = torch.device("cpu")
    if not nodes:
        return channel.beside().gather_integers([rank], device)
    split = split_by_node(channel, 2)
    return [*split.inside.gather_integers([rank], device), *split.across.gather_integers([rank], device)]


def test_channels_beside_others_are_found_whatever_groups_a_script_has_made() -> None:
    assert run_workers(beside, 3, False, timeout=40) == [[[0], [1], [2]]] * 3
    found = run_workers(beside, 4, True, timeout=40)
    assert found == [[[0], [1], [0], [2]], [[0], [1], [1], [3]], [[2], [3], [0], [2]], [[2], [3], [1], [3]]]


def of_its_own_backend(rank: int) -> tuple[str, list[list[int]]]:
    """The backend of a channel beside a group's, where that is not the default group's."""

    def make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroup:
        return dist.ProcessGroupGloo(store, rank, size, timeout)

    dist.Backend.register_backend("another", make, devices=["cpu"])
    beside = ProcessChannel(dist.new_group(backend="another"), Ledger()).beside()
    return dist.get_backend_config(beside.group), beside.gather_integers([rank], torch.device("cpu"))


def test_channels_beside_others_have_their_backend() -> None:
    assert run_workers(of_its_own_backend, 2, timeout=40) == [("cpu:another", [[0], [1]])] * 2


def test_a_detour_changes_nothing_but_the_way() -> None:
    run_workers(everything, 2)


def choices(rank: int) -> None:
    channel = ProcessChannel(None, Ledger())
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert [channel._by_way_of_host(device) for device in (cpu, gpu)] == [False, True]
    channel._backends = {"cpu": "gloo"}
    assert [channel._by_way_of_host(device) for device in (cpu, gpu)] == [False, True]
    channel._backends = {"cpu": "gloo", "cuda": "nccl"}
    assert [channel._by_way_of_host(device) for device in (cpu, gpu)] == [False, False]
    channel._backends = {"cuda": "nccl"}
    with pytest.raises(RuntimeError, match="a tensor on cpu is to be sent.*nccl for cuda only. Move the model"):
        channel.gather_integers([1], cpu)


def test_only_gloo_takes_a_gpus_tensors_by_way_of_the_host() -> None:
    run_workers(choices, 1)


def test_a_process_may_exit_right_after_a_collective(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path}/meeting"
    workers = [
        subprocess.Popen([sys.executable, "-c", VOTE_AND_EXIT, meeting, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    errors = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, errors
