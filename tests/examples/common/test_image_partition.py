"""Who has which images, and in which order they come."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard

from common.image_partition import (
    PartitionError,
    WorkerBatchSampler,
    dirichlet_partition,
    iid_partition,
    partition,
)

LABELS = np.repeat(range(10), 100).tolist()


def skew(parts: list[Any]) -> float:
    """Mean share that its largest class has of a worker's images."""
    return float(np.mean([max(Counter(np.asarray(LABELS)[part]).values()) / len(part) for part in parts]))


@pytest.mark.parametrize("alpha", [None, 0.3])
def test_every_image_has_one_worker(alpha: float | None) -> None:
    parts = partition(LABELS, 3, alpha, seed=5, batch_size=1)
    assert sorted(np.concatenate(parts)) == list(range(1000))
    again, other = (partition(LABELS, 3, alpha, seed=seed, batch_size=1) for seed in (5, 6))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])


def test_iid_parts_are_equal_and_mixed() -> None:
    parts = iid_partition(len(LABELS), 3, seed=5)
    assert sorted(map(len, parts)) == [333, 333, 334]
    assert skew(parts) < 0.2


def test_a_smaller_alpha_gives_fewer_classes_a_worker() -> None:
    parts = {alpha: [dirichlet_partition(LABELS, 4, alpha, seed) for seed in range(8)] for alpha in (100, 1, 0.1)}
    skews = [np.mean([skew(part) for part in found]) for found in parts.values()]
    assert skews == sorted(skews)
    assert skews[0] < 0.2
    assert skews[-1] > 0.35


@pytest.mark.parametrize(
    ("workers", "alpha", "batch_size", "message"),
    [
        (12, 0.01, 32, "1000 images for 12 workers by --dirichlet 0.01 and seed 1: worker .* has .*larger --dirichlet"),
        (8, None, 200, "8 workers by equal parts: worker 0 has 125, which is less than its batch of 200"),
        (2, -1.0, 1, "--dirichlet -1.0: it is a positive number"),
        (2, float("nan"), 1, "--dirichlet nan: it is a positive number"),
    ],
)
def test_a_partition_that_cannot_be_is_an_error(
    workers: int, alpha: float | None, batch_size: int, message: str
) -> None:
    with pytest.raises(PartitionError, match=message):
        partition(LABELS, workers, alpha, 1, batch_size)


def test_an_epoch_shows_every_image_once_and_the_next_another_order() -> None:
    parts = iid_partition(96, 3, seed=0)
    sampler = WorkerBatchSampler(parts, batch_size=8, seed=0)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
        assert len(epochs[-1]) == len(sampler) == 12
        assert sorted(draw.image for batch in epochs[-1] for draw in batch) == list(range(96))
        assert {draw.passes for batch in epochs[-1] for draw in batch} == {epoch}
        for number, batch in enumerate(epochs[-1]):
            assert {draw.image for draw in batch} <= set(parts[number % 3])
    assert epochs[0] == epochs[2]
    assert [draw.image for draw in epochs[0][0]] != [draw.image for draw in epochs[1][0]]


def test_unequal_workers_have_as_many_batches_and_lose_no_image() -> None:
    parts = [np.arange(10), np.arange(10, 100)]
    sampler = WorkerBatchSampler(parts, batch_size=5, seed=0)
    seen: list[list[Any]] = [[], []]
    for epoch in range(9):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == 20
        assert set(map(len, batches)) == {5}
        for worker in (0, 1):
            seen[worker] += [draw for batch in batches[worker::2] for draw in batch]
    # 9 epochs of 50 images for each: 45 times through the small part, 5 times through the large one
    for own, part, passes in zip(seen, parts, (45, 5), strict=True):
        assert len(set(own)) == len(own)
        assert Counter(draw.image for draw in own) == dict.fromkeys(part.tolist(), passes)


@pytest.mark.parametrize("workers", [2, 3])
def test_accelerate_gives_a_process_its_own_worker_s_batches(workers: int) -> None:
    parts = partition(LABELS, workers, 0.5, seed=2, batch_size=16)
    batches = list(WorkerBatchSampler(parts, 16, seed=2))
    for process in range(workers):
        own = BatchSamplerShard(WorkerBatchSampler(parts, 16, seed=2), workers, process)
        assert list(own) == batches[process::workers]
        assert len(own) == len(batches) // workers > 0
