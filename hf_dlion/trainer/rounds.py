"""The batches of virtual workers: rounds with one for each worker, dealt as accelerate deals them to processes.

Builds on what ``accelerate.data_loader`` documents: ``prepare_data_loader`` for one of several processes, its
``BatchSamplerShard`` and its ``DataLoaderDispatcher``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, prepare_data_loader
from accelerate.utils import concatenate, find_batch_size, slice_tensors
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "in_order",
)
"""Options of a torch ``DataLoader`` that say how it loads, not what."""


class Round(list[Any]):
    """A batch for each virtual worker, in their order."""


def in_rounds(loader: DataLoader, accelerator: Accelerator, workers: int) -> DataLoader:
    """A loader whose items are each a :class:`Round`, of the batches that so many processes would get.

    Where the batches are no multiple of the workers, accelerate fills the last round from the front of the data, or
    leaves it out with ``drop_last``; its settings (``even_batches``, ``split_batches``, ``dispatch_batches``) hold.

    Args:
        loader: of batches, prepared by this accelerator in one process.
        accelerator: with the settings.
        workers: N.

    Raises:
        ValueError: the workers would not get equally many batches, or the loader is no ``DataLoader``.
    """
    if not hasattr(loader, "dataset"):
        raise ValueError(
            f"virtual_workers={workers}, and a train loader of class {type(loader).__name__}: only batches of a torch "
            "DataLoader can be dealt out to them. Make it one, or start as many processes."
        )
    first = _prepared(loader, accelerator, workers, 0)
    if isinstance(first, DataLoaderDispatcher):
        dropping = getattr(loader, "_drop_last", loader.drop_last)
        rounds = _of_an_iterable(_Dispatched(first, workers, 1 if accelerator.split_batches else workers, dropping))
    elif isinstance(loader.dataset, IterableDataset):
        rounds = _of_an_iterable(_SideBySide([_prepared(loader, accelerator, workers, k) for k in range(workers)]))
    else:
        options = {name: getattr(loader, name) for name in _KEPT}
        sampler = _RoundSampler(first.batch_sampler)
        rounds = DataLoader(
            _Batches(loader.dataset, loader.collate_fn), batch_sampler=sampler, collate_fn=Round, **options
        )
    return prepare_data_loader(
        rounds,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=accelerator.device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=False,
        non_blocking=accelerator.non_blocking,
    )


def _prepared(loader: DataLoader, accelerator: Accelerator, workers: int, rank: int) -> Any:
    """The loader of one of several processes."""
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=workers,
        process_index=rank,
        split_batches=accelerator.split_batches,
        put_on_device=accelerator.device_placement,
        rng_types=accelerator.rng_types.copy(),
        dispatch_batches=accelerator.dispatch_batches,
        even_batches=accelerator.even_batches,
        use_seedable_sampler=accelerator.use_seedable_sampler,
        data_seed=accelerator.dataloader_config.data_seed,
        non_blocking=accelerator.non_blocking,
    )


class _Replay(BatchSampler):
    """What a batch sampler gave, for one shard of several."""

    def __init__(self, batches: Iterator[Sequence[int]], original: Any) -> None:
        self.batches = batches
        self.batch_size = getattr(original, "batch_size", None)  # type: ignore[assignment]
        self.drop_last = getattr(original, "drop_last", False)

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)  # copies: a shard fills a batch up in place


class _RoundSampler(BatchSampler):
    """The indices of each worker's batch, round by round.

    Args:
        first: the shard of the first process.
    """

    def __init__(self, first: BatchSamplerShard) -> None:
        self.first = first
        self.batch_sampler = first.batch_sampler  # here, accelerate looks for set_epoch
        self.sampler: Any = getattr(first.batch_sampler, "sampler", None)
        try:
            lengths = [len(self._shard(rank, first.batch_sampler)) for rank in range(first.num_processes)]
        except TypeError:  # data without an end
            return
        if len(set(lengths)) > 1:
            raise ValueError(
                f"the virtual workers would get {lengths} batches, and a step needs one of each. As many processes "
                "would wait for each other, too. Leave even_batches at True, or take dataloader_drop_last."
            )

    def _shard(self, rank: int, batch_sampler: Any) -> BatchSamplerShard:
        shard = copy.copy(self.first)
        shard.batch_sampler, shard.process_index = batch_sampler, rank
        return shard

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[tuple[list[int], ...]]:  # type: ignore[override]
        original = self.batch_sampler
        branches = itertools.tee(original, self.first.num_processes)
        shards = [self._shard(rank, _Replay(branch, original)) for rank, branch in enumerate(branches)]
        return zip(*shards, strict=True)


class _Batches(Dataset):
    """Batches by the list of their rows' indices.

    Args:
        dataset: of rows.
        collate: makes a batch of a list of rows.
    """

    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        """How many rows there are, of which the Trainer tells."""
        return len(self.dataset)

    def __getitem__(self, indices: list[int]) -> Any:
        together = getattr(self.dataset, "__getitems__", None)
        return self.collate(together(indices) if together else [self.dataset[index] for index in indices])

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _of_an_iterable(rounds: IterableDataset) -> DataLoader:
    # Its own generator: only the loaders inside draw from the global one, as in a process.
    return DataLoader(rounds, batch_size=None, collate_fn=Round, generator=torch.Generator())


class _Dispatched(IterableDataset):
    """Rounds as of a ``DataLoaderDispatcher``: batches are joined, and the rows dealt out.

    Args:
        loader: of the first process, which reads for all.
        workers: N.
        joined: how many batches of the loader make a round.
        drop_last: whether a round with fewer is left out, and rows that do not go round.
    """

    def __init__(self, loader: DataLoaderDispatcher, workers: int, joined: int, drop_last: bool) -> None:
        self.loader, self.workers, self.joined, self.drop_last = loader, workers, joined, drop_last

    def __len__(self) -> int:
        whole, more = divmod(len(self.loader.base_dataloader), self.joined)
        return whole + (more > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        batches = iter(self.loader.base_dataloader)

        def next_ones() -> list[Any]:
            found = list(itertools.islice(batches, self.joined))
            return [] if self.drop_last and len(found) < self.joined else found

        front, current = None, next_ones()
        while current:
            following, whole = next_ones(), _joined(current)
            if front is None:
                front = slice_tensors(whole, slice(self.workers))
            rows = find_batch_size(whole)
            share = rows // self.workers
            if rows % self.workers and not following and not self.drop_last:
                whole, share = concatenate([whole, front]), share + 1
            yield tuple(slice_tensors(whole, slice(k * share, (k + 1) * share)) for k in range(self.workers))
            current = following

    def set_epoch(self, epoch: int) -> None:
        self.loader.set_epoch(epoch)


def _joined(batches: list[Any]) -> Any:
    try:
        return concatenate(batches)
    except RuntimeError as error:
        raise ValueError(
            f"batches of an IterableDataset differ in more than their rows ({error}), and accelerate joins them to "
            "deal out their rows. Pad all to one length, or take accelerator_config={'dispatch_batches': False}."
        ) from error


class _SideBySide(IterableDataset):
    """Rounds of the loaders of several processes, each of which reads an iterable dataset for itself."""

    def __init__(self, loaders: Sequence[Any]) -> None:
        self.loaders = loaders
        for loader in loaders:
            shared: Any = getattr(loader.dataset, "dataset", None)
            if isinstance(getattr(shared, "generator", None), torch.Generator):
                own = copy.copy(shared)
                own.generator = shared.generator.clone_state()
                loader.dataset.dataset = own

    def __len__(self) -> int:
        return len(self.loaders[0])

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batches in itertools.zip_longest(*(loader.base_dataloader for loader in self.loaders)):
            if any(batch is None for batch in batches):
                raise ValueError(
                    "the shards of this dataset have not equally many batches, and a step needs one for each virtual "
                    "worker. Make the shards alike, or leave dispatch_batches out, and accelerate deals out rows."
                )
            yield batches

    def set_epoch(self, epoch: int) -> None:
        for loader in self.loaders:
            loader.set_epoch(epoch)
