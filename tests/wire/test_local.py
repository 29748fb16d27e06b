"""Workers that are threads of one process."""

from __future__ import annotations

import pytest
import torch

from hf_dlion.wire.ledger import Ledger
from hf_dlion.wire.local import AbsentError, LocalChannel, LocalGroup, LocalWorker


def test_collectives_are_those_of_processes() -> None:
    group, size = LocalGroup(3), 3

    def work(rank: int) -> tuple[torch.Tensor, torch.Tensor, list[str], Ledger]:
        channel = LocalChannel(LocalWorker(group, rank), Ledger())
        gathered, _ = channel.all_gather(torch.tensor([rank, 10 * rank]))
        swapped, _ = channel.all_to_all(torch.arange(size) + 10 * rank)
        return gathered, swapped, channel.gather_objects(f"rank {rank}"), channel.ledger

    for _ in range(2):
        for rank, (gathered, swapped, objects, ledger) in enumerate(group.run(work)):
            assert gathered.tolist() == [[0, 0], [1, 10], [2, 20]]
            assert swapped.tolist() == [rank, 10 + rank, 20 + rank]
            assert objects == ["rank 0", "rank 1", "rank 2"]
            assert ledger == Ledger(2 * 16 + 2 * 8, 2 * 16 + 2 * 8, 0)


def test_workers_take_turns() -> None:
    group, order = LocalGroup(3), []

    def work(rank: int) -> None:
        for meeting in range(3):
            order.append((meeting, rank))
            group.meet(rank, None)

    group.run(work)
    assert order == [(meeting, rank) for meeting in range(3) for rank in range(3)]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failing_worker_keeps_none_waiting(failing: int) -> None:
    group, absent = LocalGroup(3), []

    def work(rank: int) -> None:
        group.meet(rank, None)
        if rank == failing:
            raise ValueError("of this worker")
        try:
            group.meet(rank, None)
        except AbsentError as error:
            absent.append(str(error))
            raise

    with pytest.raises(ValueError, match="of this worker"):
        group.run(work)
    assert absent == [f"worker {failing} did not come to a collective."] * 2
    assert group.run(lambda rank: len(group.meet(rank, None))) == [3, 3, 3]
