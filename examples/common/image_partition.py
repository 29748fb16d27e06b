"""Which images a worker has, and in which batches it meets them."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import BatchSampler

Part = NDArray[np.int64]
"""Indices of one worker's images."""


class PartitionError(ValueError):
    """The images cannot be dealt out so; the message says what was given, why not, and what to do instead."""


class Draw(NamedTuple):
    """One look at an image, and how often its worker had been through all of its images before."""

    image: int
    """Its index."""
    passes: int


def iid_partition(count: int, workers: int, seed: int) -> list[Part]:
    """`count` images dealt out at random, in parts whose sizes differ by one at most."""
    return np.array_split(np.random.default_rng(seed).permutation(count), workers)


def dirichlet_partition(labels: Sequence[int], workers: int, alpha: float, seed: int) -> list[Part]:
    """Every class's images dealt out in shares drawn from Dirichlet(alpha), as in arXiv 1905.12022.

    The smaller alpha, the fewer classes a worker has; the parts differ in size.
    """
    random = np.random.default_rng(seed)
    parts: list[list[Part]] = [[] for _ in range(workers)]
    for label in np.unique(labels):
        own = random.permutation(np.flatnonzero(np.asarray(labels) == label))
        cuts = np.cumsum(random.dirichlet(np.full(workers, alpha)))[:-1] * len(own)
        for part, share in zip(parts, np.split(own, cuts.round().astype(int)), strict=True):
            part.append(share)
    return [np.concatenate(part) for part in parts]


def partition(labels: Sequence[int], workers: int, alpha: float | None, seed: int, batch_size: int) -> list[Part]:
    """One part a worker: iid where `alpha` is None, else `dirichlet_partition`.

    Raises:
        PartitionError: a worker has less than a batch, or alpha is not positive.
    """
    if alpha is not None and not 0 < alpha < float("inf"):
        raise PartitionError(f"--dirichlet {alpha}: it is a positive number; leave it out for equal parts.")
    if alpha is None:
        parts = iid_partition(len(labels), workers, seed)
    else:
        parts = dirichlet_partition(labels, workers, alpha, seed)
    sizes = [len(part) for part in parts]
    if min(sizes) < batch_size:
        dealt = "equal parts" if alpha is None else f"--dirichlet {alpha:g} and seed {seed}"
        raise PartitionError(
            f"{len(labels)} images for {workers} workers by {dealt}: worker {sizes.index(min(sizes))} has "
            f"{min(sizes)}, which is less than its batch of {batch_size}. Give fewer workers, a smaller "
            f"--per_device_train_batch_size{'' if alpha is None else ', a larger --dirichlet, another --data_seed'}."
        )
    return parts


class WorkerBatchSampler(BatchSampler):
    """Batches of worker 0, 1, ..., N - 1, and again from worker 0: batch j is of worker j mod N.

    accelerate gives batch j to process j mod N, and virtual workers take the same turns, so a worker meets the same
    images whether it is a process or not. An epoch has as many rounds as N batches fit into all images. Each worker
    goes through its part in a new order every time, and on from one epoch to the next: a worker with a small part has
    begun it again before the epoch ends, and one with a large part goes on with the rest in the next epoch.

    Args:
        parts: of each worker.
        batch_size: of a worker.
        seed: of the orders, with the worker and the pass.
    """

    def __init__(self, parts: Sequence[Part], batch_size: int, seed: int) -> None:
        self.parts, self.batch_size, self.seed = parts, batch_size, seed
        self.drop_last = True
        self.rounds = sum(map(len, parts)) // (len(parts) * batch_size)
        self.epoch = 0

    def __len__(self) -> int:
        return self.rounds * len(self.parts)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[Draw]]:  # type: ignore[override]
        draws = [self._draws(worker) for worker in range(len(self.parts))]
        for _ in range(self.rounds):
            for own in draws:
                yield list(islice(own, self.batch_size))

    def _draws(self, worker: int) -> Iterator[Draw]:
        part = self.parts[worker]
        passes, met = divmod(self.epoch * self.rounds * self.batch_size, len(part))
        while True:
            order = np.random.default_rng((self.seed, passes, worker)).permutation(part)
            yield from (Draw(int(image), passes) for image in order[met:])
            passes, met = passes + 1, 0
