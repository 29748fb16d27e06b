"""What a Trainer saves and resumes from, where each worker has something of its own.

Extension points of transformers 5: ``save_model``, ``_save_checkpoint`` and ``_save``, with
``_save_optimizer_and_scheduler``, ``_load_optimizer_and_scheduler``, ``_save_scaler`` and ``_load_scaler``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_model
from torch import nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from ..checkpoint.complete import check_complete, newest_complete
from ..checkpoint.manifest import ANY_PART, MANIFEST, CheckpointError, has_workers, written_by_others
from ..checkpoint.workers import load_workers, remove_manifest, save_workers
from .workers import WorkersMixin


class CheckpointsMixin(WorkersMixin):
    """Saves every worker's part, and resumes from checkpoints that are whole; without votes, nothing changes."""

    lr_scheduler: Any
    is_fsdp_enabled: bool

    _steps_made = 0
    """In the checkpoint that is resumed from."""

    def _resumed(self, wanted: str | bool) -> str | bool:
        """The checkpoint to resume from: a whole one, where it is of ours."""
        folder = get_last_checkpoint(self.args.output_dir) if wanted is True else str(wanted)
        if self._gradients_stay_local or (folder is not None and has_workers(folder)):
            folder = self._whole_checkpoint(wanted)
        if folder is None:
            return wanted  # the parent says that there is none
        state = os.path.join(folder, TRAINER_STATE_NAME)
        self._steps_made = TrainerState.load_from_json(state).global_step if os.path.isfile(state) else 0
        return folder

    def _whole_checkpoint(self, wanted: str | bool) -> str:
        if wanted is not True:
            check_complete(str(wanted))
            return str(wanted)
        newest, others = newest_complete(self.args.output_dir)
        if newest is None:
            raise CheckpointError(
                f"resume_from_checkpoint=True, and there is no complete checkpoint in {self.args.output_dir}. "
                f"{' '.join(others)}{' ' * bool(others)}Leave it out to start from the beginning."
            )
        return newest

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if not self._gradients_stay_local or self.args.save_only_model:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            return
        run = self._get_output_dir(trial=trial)  # type: ignore[attr-defined]
        folder = os.path.join(run, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        remove_manifest(folder, self.args.should_save)
        # An older checkpoint is deleted, and this one pushed, when this one counts.
        limit, push = self.args.save_total_limit, self.args.push_to_hub
        self.args.save_total_limit, self.args.push_to_hub = None, False
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, push
        if self.args.should_save:
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))  # which were written without the two
        save_workers(folder, self.optimizer, write_manifest=self.args.should_save)
        if push:
            self._push_from_checkpoint(folder)  # type: ignore[attr-defined]
        if self.args.should_save:
            self._delete_older_checkpoints(run)  # type: ignore[attr-defined]

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As the parent; between two votes of local steps, the parameters of the last vote."""
        with self._voted_parameters():
            super().save_model(*args, **kwargs)  # type: ignore[misc]

    def _checkpoint_push_skip_names(self, checkpoint_folder: str) -> set[str]:
        """As the parent, of sentence-transformers: what is not for the hub; and no worker's state."""
        skipped: set[str] = super()._checkpoint_push_skip_names(checkpoint_folder)  # type: ignore[misc]
        return skipped | {MANIFEST, *(path.name for path in Path(checkpoint_folder).glob(ANY_PART))}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not (
            self._gradients_stay_local and self.args.save_on_each_node and hasattr(model, "should_save_on_this_rank")
        ):
            super()._save(output_dir, state_dict)  # type: ignore[misc]
            return
        # Models of transformers 5.23 save themselves on rank 0 only, whatever is_main_process says.
        model.should_save_on_this_rank = lambda is_main_process: is_main_process
        try:
            super()._save(output_dir, state_dict)  # type: ignore[misc]
        finally:
            del model.should_save_on_this_rank

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._gradients_stay_local:
            super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
            return
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            with self._voted_parameters():
                save_fsdp_model(plugin, self.accelerator, self.model, output_dir, adapter_only=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._gradients_stay_local:
            if checkpoint is not None and has_workers(checkpoint):
                raise CheckpointError(written_by_others(checkpoint, type(self._own_optimizer()).__name__))
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        policy = getattr(self.args, "resume_world_size_policy", "mean")
        load_workers(checkpoint, self.optimizer, resume_world_size_policy=policy)
        scheduler = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        if not self._gradients_stay_local:  # each worker's is in its own part
            super()._save_scaler(output_dir)  # type: ignore[misc]

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self._gradients_stay_local:
            super()._load_scaler(checkpoint)  # type: ignore[misc]
