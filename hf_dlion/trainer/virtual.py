"""What a Trainer does otherwise with virtual workers: it takes a round of batches where it took a batch.

So it counts batches, steps and epochs as each of as many processes would. Extension points of transformers 5:
``get_train_dataloader`` and ``training_step``, also where a subclass has its own, and what else it does with a batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from .rounds import Round, in_rounds
from .workers import WorkersMixin

logger = logging.getLogger(__name__)


class VirtualWorkersMixin(WorkersMixin):
    """Gives any Trainer virtual workers; with one worker a process, nothing changes."""

    callback_handler: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As the parent; from then on the train loader gives rounds, also where a subclass makes it.

        A search of hyperparameters calls it for each trial.
        """
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self._virtual_workers > 1 and "get_train_dataloader" not in vars(self):
            of_batches = self.get_train_dataloader  # type: ignore[has-type]
            self.get_train_dataloader = lambda: in_rounds(of_batches(), self.accelerator, self._virtual_workers)
        if (self._virtual_workers > 1 or self._gradient_votes) and "training_step" not in vars(self):
            self.training_step = partial(self._step_of_all, self.training_step)  # type: ignore[has-type]

    def _step_of_all(
        self,
        of_one: Callable[..., torch.Tensor],
        model: nn.Module,
        inputs: Any,
        num_items_in_batch: torch.Tensor | int | list[Any] | None = None,
    ) -> torch.Tensor:
        """As a worker's own training step; of a round, a turn of each worker, and the mean of their losses.

        With votes on gradients, they are those decided after the last micro-batch of a step.
        """
        self._vote_on_shards(model)  # type: ignore[attr-defined]
        voting, alone = self.voting, self._in_turns  # type: ignore[attr-defined]
        if voting is not None:
            voting.step = self.state.global_step
        if not isinstance(inputs, Round) and alone is None:
            # What an epoch leaves over for the next one, DDP would vote on now, and on the sum again then.
            waits = voting is not None and not self.accelerator.sync_gradients
            with self.accelerator.no_sync(model) if waits else nullcontext():
                return of_one(model, inputs, num_items_in_batch)
        turns, losses = alone or self._own_optimizer(), []
        for rank, batch in enumerate(inputs if isinstance(inputs, Round) else [inputs]):
            items = num_items_in_batch[rank] if isinstance(num_items_in_batch, list) else num_items_in_batch
            losses.append(of_one(model, batch, items))
            turns.take_turn(rank)
        if alone is not None and self.accelerator.sync_gradients:
            alone.decide()
        return torch.stack(losses).mean()

    def _warn_of_unseen_gradients(self) -> None:
        for callback in self._callbacks_before_step:
            logger.warning(
                "%s.on_pre_optimizer_step sees no gradients with virtual_workers=%d: each worker's have been taken "
                "after its backward, so what it does to them is lost. Put hooks on parameters, or start processes.",
                type(callback).__name__, self._virtual_workers,
            )  # fmt: skip

    def get_total_train_batch_size(self, args: Any) -> int:
        """As the parent, of all virtual workers."""
        return super().get_total_train_batch_size(args) * self._virtual_workers  # type: ignore[misc]

    def floating_point_ops(self, inputs: Any) -> int:
        """As the parent, of a whole round."""
        theirs = super().floating_point_ops  # type: ignore[misc]
        return sum(map(theirs, inputs)) if isinstance(inputs, Round) else theirs(inputs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """By worker, as what it sends comes from the mean over its own batches."""
        theirs = super()._get_num_items_in_batch  # type: ignore[misc]
        if not batch_samples or not isinstance(batch_samples[0], Round):
            return theirs(batch_samples, device)
        return [theirs(list(own), device) for own in zip(*batch_samples, strict=True)]

    def _track_num_input_tokens(self, inputs: Any) -> None:
        for batch in inputs if isinstance(inputs, Round) else [inputs]:
            super()._track_num_input_tokens(batch)  # type: ignore[misc]
