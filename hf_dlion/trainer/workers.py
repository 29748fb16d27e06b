"""What a Trainer knows of its workers; of what its arguments ask for, and of the optimizer that it has."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..optim.workers import members_of
from .methods import METHODS


class WorkersMixin:
    """The base of what :class:`hf_dlion.DLionTrainerMixin` is made of; it changes nothing."""

    args: Any
    accelerator: Any
    callback_handler: Any
    optimizer: Any
    model: Any
    state: Any

    @property
    def _gradients_stay_local(self) -> bool:
        made: Any = getattr(self, "optimizer", None)  # not there yet, as a Trainer is made
        return self._named_ours or bool(members_of(made))

    @property
    def _named_ours(self) -> bool:
        """Whether the arguments ask for one of our methods, or for local steps."""
        return self.args.optim in METHODS or self._local_steps > 0

    @property
    def _local_steps(self) -> int:
        return getattr(self.args, "local_steps", 0)  # plain TrainingArguments have none

    @property
    def _exchanges(self) -> bool:
        """Whether votes or codes travel by this package."""
        return self._gradients_stay_local or bool(self._gradient_votes)

    @property
    def _virtual_workers(self) -> int:
        return getattr(self.args, "virtual_workers", 1)  # plain TrainingArguments have none

    @property
    def _gradient_votes(self) -> str | None:
        return getattr(self.args, "gradient_votes", None)  # plain TrainingArguments have none

    @property
    def _callbacks_before_step(self) -> list[Any]:
        """Those of users that are called between clipping and step, and so may change gradients."""
        known = ("transformers", __package__.partition(".")[0])
        before = ((callback, type(callback).on_pre_optimizer_step) for callback in self.callback_handler.callbacks)
        return [callback for callback, method in before if method.__module__.partition(".")[0] not in known]

    def _own_optimizer(self) -> Any:
        """As it is, where accelerate has wrapped it."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _has_virtual_workers(self) -> bool:
        return len(members_of(self.optimizer)) > 1

    def _voted_parameters(self) -> AbstractContextManager[None]:
        optimizer = self._own_optimizer()
        return optimizer.voted_parameters() if members_of(optimizer) else nullcontext()
