"""The Trainer, and the mixin that makes any Trainer vote.

Extension points of transformers 5: ``create_accelerator_and_postprocess``, ``create_optimizer`` with
``optimizer_cls_and_kwargs``, ``training_step``, ``_clip_grad_norm`` and ``_get_grad_norm``, ``log``, and
``_save_checkpoint`` and ``_save``, with ``_save_optimizer_and_scheduler``, ``_load_optimizer_and_scheduler``,
``_save_scaler`` and ``_load_scaler``.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import save_fsdp_model
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer import SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from ..checkpoint.complete import check_complete, last_complete_checkpoint
from ..checkpoint.manifest import CheckpointError
from ..checkpoint.workers import load_workers, remove_manifest, save_workers
from ..local_gradients import keep_gradients_local, voting_group
from ..optim.hidden import hidden_matrices
from ..optim.tensors import local, whole
from ..optim.virtual import VirtualWorkers
from ..optim.workers import all_parameters, members_of
from ..wire.collectives import drain_gloo
from ..wire.ledger import Ledger, fp32_all_reduce_bytes
from ..wire.liveness import report_lost_workers
from .card import write_card
from .methods import METHODS
from .theory import LionTheoryCallback
from .transformers_versions import TrainerVersionsMixin


class DLionTrainerMixin(TrainerVersionsMixin):
    """Makes a Trainer run the methods of this package by name; put it first among the bases.

    With ``args.optim`` one of ours, gradients stay on their worker, the optimizer exchanges votes, and the training
    log has, besides what transformers puts there:

    - ``bits_sent_per_param``, ``bits_received_per_param``: by this rank, per trainable parameter and step, since the
      last log;
    - ``bytes_sent_total``: by this rank since the start of ``train()``;
    - ``fp32_allreduce_ratio``: bytes sent over those of an fp32 all-reduce of the gradients;
    - ``bad_gradients``: how many workers were left out of a step for a NaN or Inf in their gradient;
    - ``vote_ties``, ``vote_unanimous``: the shares of parameters on which the workers were split evenly, or agreed;
    - ``grad_norm``: the mean over the workers of the norm of each one's own gradient, before clipping;
    - what a :class:`LionTheoryCallback` among the callbacks observed.

    ``max_grad_norm`` clips each worker's gradient by that gradient's own norm. A common factor changes no sign, so
    where signs travel this only weighs the steps against each other inside the momentum; 0 turns it off.

    With ``args.virtual_workers`` above 1, each of the batches that make a step is one virtual worker's
    (:class:`hf_dlion.optim.virtual.VirtualWorkers`).

    With any other ``optim`` the Trainer is what it was.
    """

    args: Any
    accelerator: Any
    callback_handler: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    current_gradient_accumulation_steps: int
    is_fsdp_enabled: bool

    def create_accelerator_and_postprocess(self) -> None:
        """As the parent, and gradients are kept local."""
        super().create_accelerator_and_postprocess()
        if not self._gradients_stay_local:
            return
        if self.args.n_gpu > 1:
            raise ValueError(
                f"optim={self.args.optim!r} with {self.args.n_gpu} GPUs in one process (nn.DataParallel): a process is "
                "one worker and has one vote. Start one process per GPU: `accelerate launch --multi_gpu script.py`."
            )
        if self.args.virtual_workers > 1 and self.args.world_size > 1:
            raise ValueError(
                f"virtual_workers={self.args.virtual_workers} in {self.args.world_size} processes: virtual workers are "
                "all in one. Start one process, or leave virtual_workers out."
            )
        keep_gradients_local(self.accelerator)
        if self.args.use_cpu and dist.is_initialized():
            # transformers 5.23 gives a process group on the CPU no time limit of its own, whatever ddp_timeout says.
            dist.distributed_c10d._set_pg_timeout(self.args.ddp_timeout_delta)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As the parent, with the method that ``args.optim`` names."""
        if self._gradients_stay_local:
            self._refuse_loaded_in_shards()
            method = METHODS[self.args.optim]
            keywords = {
                **method.keywords(self.args),
                "process_group": voting_group(self.accelerator),
                "on_bad_gradient": self.args.on_bad_gradient,
                "check_replicas_steps": self.args.check_replicas_steps,
            }
            if method.takes_hidden_matrices:
                keywords["params"] = self._hidden_groups(self.model if model is None else model)
            self.optimizer_cls_and_kwargs: Any = (method.optimizer, keywords)
            if self.args.virtual_workers > 1:
                virtual = {
                    "workers": self.args.virtual_workers,
                    "method": method.optimizer,
                    "adversaries": self.args.adversaries,
                    "adversary": self.args.adversary,
                }
                del keywords["process_group"]
                self.optimizer_cls_and_kwargs = (VirtualWorkers, virtual | keywords)
        optimizer: Optimizer = super().create_optimizer(model)
        if self._gradients_stay_local:
            self._check_and_name(self.model if model is None else model)
        self._logged, self._logged_bad_gradients = Ledger(), 0
        return optimizer

    def _refuse_loaded_in_shards(self) -> None:
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                f"optim={self.args.optim!r} with a model that was loaded in shards (DistributedConfig): its gradients "
                "would be averaged over all of them. Load it whole, and let accelerate shard it: "
                "examples/launch/sharded_replicas.yaml."
            )

    def _hidden_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        decayed = set(self.get_decay_parameter_names(model))  # type: ignore[attr-defined]
        groups = hidden_matrices(model, decayed=decayed)
        return [{"weight_decay": self.args.weight_decay, **group} for group in groups]

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent; only a checkpoint that is whole is resumed from (:mod:`hf_dlion.checkpoint`).

        Raises:
            CheckpointError: the checkpoint given is not whole; with True, none in the output folder is.
            WorkerLostError: a collective failed; with the ranks that did not answer.
        """
        if not self._gradients_stay_local:
            return super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        if resume_from_checkpoint:
            resume_from_checkpoint = self._whole_checkpoint(resume_from_checkpoint)
        with report_lost_workers("training"):
            output: TrainOutput = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
        drain_gloo()  # so that accelerator.end_training() may follow at once
        return output

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """As the parent; with virtual workers, a turn of the next one."""
        optimizer: Any = self._own_optimizer()
        if len(members_of(optimizer)) < 2:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        # What a worker sends comes from the mean over its own batch, not over those of all.
        batches, self.current_gradient_accumulation_steps = self.current_gradient_accumulation_steps, 1
        if num_items_in_batch is not None:
            num_items_in_batch = self._get_num_items_in_batch([inputs], self.args.device)  # type: ignore[attr-defined]
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        self.current_gradient_accumulation_steps = batches
        if not optimizer.gradients:
            self._turn_norms = []
        self._turn_norms.append(self._clip(model, self.args.max_grad_norm or math.inf))
        optimizer.next_worker()
        return loss / batches

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent, with the traffic and the votes in the logs of training."""
        # Only the training log has both; the Trainer writes it on all ranks at once, so collectives are safe.
        if self._gradients_stay_local and "loss" in logs and "learning_rate" in logs:
            logs = {**logs, **self._observations(logs)}
        super().log(logs, start_time)  # type: ignore[misc]

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if not self._gradients_stay_local:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return self._clip(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._gradients_stay_local:
            grad_norm = self._clip(model, math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _clip(self, model: nn.Module, limit: float) -> torch.Tensor:
        """Returns the norm; where it is not finite, gradients stay as they are, and the bad one can be found."""
        self.accelerator.unscale_gradients()
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        norm = whole(get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None]))
        clip_grads_with_norm_(parameters, limit, torch.where(norm.isfinite(), norm, 0.0))
        return norm

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
            self._delete_older_checkpoints(run)

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
            save_fsdp_model(plugin, self.accelerator, self.model, output_dir, adapter_only=True)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._gradients_stay_local:
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
            return
        load_workers(checkpoint, self.optimizer, resume_world_size_policy=self.args.resume_world_size_policy)
        scheduler = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        if not self._gradients_stay_local:  # each worker's is in its own part
            super()._save_scaler(output_dir)  # type: ignore[misc]

    def _load_scaler(self, checkpoint: str | None) -> None:
        if not self._gradients_stay_local:
            super()._load_scaler(checkpoint)  # type: ignore[misc]

    @property
    def _gradients_stay_local(self) -> bool:
        return self.args.optim in METHODS

    def _whole_checkpoint(self, wanted: str | bool) -> str:
        if wanted is True:
            newest = last_complete_checkpoint(self.args.output_dir)
            if newest is None:
                raise CheckpointError(
                    f"resume_from_checkpoint=True, and there is no complete checkpoint in {self.args.output_dir}. "
                    "Leave it out to start from the beginning."
                )
            return newest
        check_complete(str(wanted))
        return str(wanted)

    def _check_and_name(self, model: nn.Module) -> None:
        """While gradients stay on their worker, only our optimizers may step. Their errors get the model's names."""
        optimizer = self._own_optimizer()
        if not members_of(optimizer):
            raise ValueError(
                f"optim={self.args.optim!r}, and an optimizer of class {type(optimizer).__name__} was given: no worker "
                "would learn from the others. Leave it out, or take the optim of transformers that it is."
            )
        names: dict[Any, str] = {parameter: name for name, parameter in model.named_parameters()}
        found = [names.get(parameter, "") for parameter in all_parameters(optimizer)]
        for member in members_of(optimizer):
            member.parameter_names = found

    def _own_optimizer(self) -> Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def _observations(self, logs: dict[str, float]) -> dict[str, float]:
        optimizer: Any = self._own_optimizer()
        if not members_of(optimizer):
            return {}
        found = self._traffic(optimizer)
        found["bad_gradients"] = optimizer.bad_gradients - self._logged_bad_gradients
        self._logged_bad_gradients = optimizer.bad_gradients
        shares = optimizer.vote_shares()
        if shares is not None:
            found |= {"vote_ties": shares.ties, "vote_unanimous": shares.unanimous}
        if "grad_norm" in logs:
            norm = torch.tensor(logs["grad_norm"], device=self.accelerator.device)
            if len(members_of(optimizer)) > 1:
                norm = torch.stack(self._turn_norms).mean()
            found["grad_norm"] = self.accelerator.reduce(norm, reduction="mean").item()
        found = {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LionTheoryCallback):
                found |= callback.observations()
        return found

    def _traffic(self, optimizer: Any) -> dict[str, float]:
        parameters = sum(parameter.numel() for parameter in all_parameters(optimizer))
        total = optimizer.ledger
        new = total.since(self._logged)
        self._logged = total.copy()
        found: dict[str, float] = {"bytes_sent_total": total.sent_bytes}
        if new.steps:
            found["bits_sent_per_param"] = 8 * new.sent_bytes / (parameters * new.steps)
            found["bits_received_per_param"] = 8 * new.received_bytes / (parameters * new.steps)
            workers = optimizer.members[0].workers
            if workers > 1:
                held = sum(local(parameter).numel() for parameter in all_parameters(optimizer))
                dense = fp32_all_reduce_bytes(held, workers) * new.steps
                found["fp32_allreduce_ratio"] = new.sent_bytes / dense
        return found


class DLionTrainer(DLionTrainerMixin, Trainer):
    """``transformers.Trainer`` that trains by Distributed Lion where ``args.optim`` says so."""

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
        loss_key: str = "eval_loss",
    ) -> None:
        """Write the card of the run, ``README.md`` with ``learning_curve.png``, into the output folder, on rank 0.

        With metadata for the hub (base model, datasets, library, tags, validation results), the method and its
        settings, the learning curve, the bytes a worker sent against an fp32 all-reduce, versions and command. Results
        of other evaluations in a card that is there already are kept. ``push_to_hub`` calls this.

        Args:
            language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args: as in
                ``Trainer.create_model_card``. Names that are no repository's are in the text only.
            loss_key: entry of the log with the validation loss, in nats: per token, or per row of a classifier.
        """
        if self.is_world_process_zero():
            write_card(
                self,
                loss_key,
                language=language,
                license=license,
                tags=tags,
                model_name=model_name,
                finetuned_from=finetuned_from,
                tasks=tasks,
                dataset_tags=dataset_tags,
                dataset=dataset,
                dataset_args=dataset_args,
            )
