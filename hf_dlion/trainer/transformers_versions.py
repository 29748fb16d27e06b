"""What ``DLionTrainerMixin`` takes for granted in a Trainer, and transformers before 5.3 does otherwise."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import transformers
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, trainer_utils

from ..local_gradients import LocalGradients, keep_gradients_local
from .workers import WorkersMixin

logger = logging.getLogger(__name__)

_HAS_CLIP = hasattr(Trainer, "_clip_grad_norm")
_BOTH = "create_optimizer_and_scheduler"
_CALLS_BOTH = any(
    _BOTH in function.__code__.co_names for function in vars(Trainer).values() if inspect.isfunction(function)
)


class TrainerVersionsMixin(WorkersMixin):
    """Gives any Trainer the extension points of transformers 5.3; with that or a newer one, nothing changes."""

    def create_accelerator_and_postprocess(self) -> None:
        """As the parent; where that clips by the accelerator, this clips by :meth:`_clip_grad_norm`."""
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        if self._gradients_stay_local and not _HAS_CLIP:
            # Called only where max_grad_norm is not 0: with 0, the log has no grad_norm.
            self.accelerator.clip_grad_norm_ = lambda *_, **__: self._clip_and_get_norm()

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As the parent, which may not take the model, as in an older Trainer or one written for it."""
        takes_model = "model" in inspect.signature(super().create_optimizer).parameters  # type: ignore[misc]
        optimizer: Optimizer = super().create_optimizer(*([model] if takes_model else []))  # type: ignore[misc]
        return optimizer

    def _warn_of_what_is_not_called(self) -> None:
        """An optimizer that is made there is not the one that steps."""
        if not _CALLS_BOTH and getattr(type(self), _BOTH) is not getattr(Trainer, _BOTH):
            logger.warning(
                "%s has a %s of its own, which transformers %s does not call: what steps is the optimizer of "
                "create_optimizer. Override that, and create_scheduler, or pass optimizers=.",
                type(self).__name__, _BOTH, transformers.__version__,
            )  # fmt: skip

    def _clip_and_get_norm(self) -> Any:
        return self._get_grad_norm(self.model, grad_norm=self._clip_grad_norm(self.model))  # type: ignore[attr-defined]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return super()._get_grad_norm(model, grad_norm=grad_norm) if _HAS_CLIP else grad_norm  # type: ignore[misc]

    def _wrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        wrapped: nn.Module = super()._wrap_model(model, *args, **kwargs)  # type: ignore[misc]
        # Before 5.3 this sets a handler of its own.
        if self._gradients_stay_local and not isinstance(self.accelerator.ddp_handler, LocalGradients):
            keep_gradients_local(self.accelerator)
        if self._gradient_votes:
            self._hook_in()  # type: ignore[attr-defined]
        return wrapped

    def _delete_older_checkpoints(self, run: str) -> None:
        """All but ``args.save_total_limit`` of those in the folder of a run."""
        if not hasattr(trainer_utils, "rotate_checkpoints"):
            self._rotate_checkpoints(use_mtime=True, output_dir=run)  # type: ignore[attr-defined]
            return
        best = self.state.best_model_checkpoint
        trainer_utils.rotate_checkpoints(run, self.args.save_total_limit, best_model_checkpoint=best, use_mtime=True)
