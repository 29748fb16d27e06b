"""A checkpoint just before a job is ended (``enable_jit_checkpoint``), where ranks exchange votes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.trainer_jit_checkpoint import JITCheckpointCallback


class AgreedCheckpointCallback(JITCheckpointCallback):
    """transformers' callback, but that all ranks write the checkpoint after the same step.

    A SIGTERM reaches the ranks at different places of a step; one that saved there would wait for ranks that vote.

    Args:
        replaced: transformers' own, which has the handler of the signal.
    """

    def __init__(self, replaced: JITCheckpointCallback) -> None:
        super().__init__()
        self.trainer, self.jit_manager = replaced.trainer, replaced.jit_manager

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, and so before a step and after an epoch."""

    on_step_begin = on_epoch_end = on_pre_optimizer_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop, if any rank was asked to. A collective."""
        trainer, manager = self.trainer, self.jit_manager
        asked = torch.tensor(float(manager.is_checkpoint_requested), device=args.device)
        if not trainer.accelerator.reduce(asked, reduction="sum"):
            return
        manager.is_checkpoint_requested = False
        control.should_save, control.should_training_stop = False, True
        trainer._save_checkpoint(trainer.model, trial=None)


def agree_on_checkpoints(trainer: Any) -> None:
    """Let an :class:`AgreedCheckpointCallback` take the place of transformers' own, if that is there."""
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if type(callback) is JITCheckpointCallback:
            callbacks[place] = AgreedCheckpointCallback(callback)
