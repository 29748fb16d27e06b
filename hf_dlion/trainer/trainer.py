"""The Trainer, and the mixin that makes any Trainer vote.

Extension points of transformers 5: ``create_accelerator_and_postprocess``, ``create_optimizer`` with
``get_optimizer_cls_and_kwargs``, ``_wrap_model``, ``set_initial_training_values`` and ``_maybe_log_save_evaluate``; and
those of the mixins beside this file.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from copy import copy
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput, TrainOutput

from ..local_gradients import LocalGradients, keep_gradients_local, voting_group
from ..optim.hidden import hidden_matrices
from ..optim.local_steps import LocalSteps
from ..optim.states import all_parameters
from ..optim.virtual import VirtualWorkers
from ..optim.workers import members_of
from ..wire.collectives import drain_gloo
from ..wire.liveness import report_lost_workers
from .arguments import DLionArgumentsMixin
from .card import write_card
from .checkpoints import CheckpointsMixin
from .clipping import ClippingMixin
from .methods import METHODS, Method, in_local_steps, local_steps_options, method_of
from .overrides import on_class_too, split_by_hidden
from .training_log import TrainingLogMixin
from .transformers_versions import TrainerVersionsMixin
from .virtual import VirtualWorkersMixin

logger = logging.getLogger(__name__)


class DLionTrainerMixin(CheckpointsMixin, ClippingMixin, VirtualWorkersMixin, TrainerVersionsMixin, TrainingLogMixin):
    """Makes a Trainer run the methods of this package by name; put it first among the bases.

    With ``args.optim`` one of ours, or with an optimizer of ours from elsewhere (``optimizers``,
    ``optimizer_cls_and_kwargs``, an override of ``create_optimizer`` or ``get_optimizer_cls_and_kwargs``), gradients
    stay on their worker, the optimizer exchanges votes, and the training log has, besides what transformers puts there:

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

    With ``args.virtual_workers`` above 1, a step takes the batches that so many processes would, each as one virtual
    worker's (:class:`hf_dlion.optim.virtual.VirtualWorkers`).

    With any other ``optim`` and ``args.gradient_votes``, the workers vote on the gradients
    (:class:`hf_dlion.optim.signed_gradients.SignedGradients`), and the log has the same, but that ``grad_norm`` is that
    of what was decided. Without either the Trainer is what it was, but that a run that has made all its steps, and is
    resumed, makes no more.
    """

    args: Any
    accelerator: Any
    optimizer: Any
    optimizer_cls_and_kwargs: Any
    lr_scheduler: Any
    model: Any
    state: Any
    is_fsdp_enabled: bool

    def __init_subclass__(cls, **options: Any) -> None:
        """Raise TypeError where the mixin comes after the Trainer that it extends."""
        super().__init_subclass__(**options)
        for base in cls.__mro__[: cls.__mro__.index(DLionTrainerMixin)]:
            if issubclass(base, Trainer) and not issubclass(base, DLionTrainerMixin):
                raise TypeError(
                    f"class {cls.__name__} has {base.__name__} before DLionTrainerMixin, which would not come into "
                    f"play. Put the mixin first: class {cls.__name__}(DLionTrainerMixin, {base.__name__})."
                )

    def create_accelerator_and_postprocess(self) -> None:
        """As the parent, and gradients are kept local."""
        super().create_accelerator_and_postprocess()
        if self._gradient_votes:
            self._check_processes(f"gradient_votes={self._gradient_votes!r}")
            self._hook_in()
        if not self._named_ours:
            return
        if not isinstance(self.args, DLionArgumentsMixin):
            raise TypeError(
                f"args is a {type(self.args).__name__} whose optim was set to {self.args.optim!r}: it has none of the "
                "options of that method. Take DLionTrainingArguments, or a dataclass with DLionArgumentsMixin as its "
                "first base."
            )
        self.args.take_method()
        self._keep_gradients_local()

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As the parent, with the method that ``args.optim`` names."""
        given, of_model = self.optimizer_cls_and_kwargs, self.model if model is None else model
        if self.optimizer is None:
            self.optimizer_cls_and_kwargs = self._completed(given, of_model)
        try:
            optimizer: Optimizer = super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = given
        if self._local_steps and all(member.inner is None for member in members_of(optimizer)):
            options = local_steps_options(self.args)
            if (group := voting_group(self.accelerator)) is not None:  # else the workers are those of the inner one
                options["process_group"] = group
            self.optimizer = optimizer = LocalSteps(optimizer, **options)
        self._check_optimizer()
        return optimizer

    @on_class_too
    def get_optimizer_cls_and_kwargs(self, args: Any, model: nn.Module | None = None) -> tuple[Any, dict[str, Any]]:
        """As the parent, with our names too; with these, in the param groups that an override of the parent's makes."""
        parent = super().get_optimizer_cls_and_kwargs  # type: ignore[misc]
        if args.optim not in METHODS:
            return parent(args, model)
        method = METHODS[args.optim]
        options = {"on_bad_gradient": args.on_bad_gradient, "check_replicas_steps": args.check_replicas_steps}
        keywords = {**method.keywords(args), **options}
        if not isinstance(self, Trainer):
            return method.optimizer, keywords
        if self._virtual_workers == 1:
            keywords["process_group"] = voting_group(self.accelerator)
        if parent is not Trainer.get_optimizer_cls_and_kwargs:
            neutral = copy(args)
            neutral.optim, neutral.optim_args = "adamw_torch", None
            of_parent = parent(neutral, model)[1]
            keywords |= {name: of_parent[name] for name in ("params", "optimizer_dict") if name in of_parent}
        return method.optimizer, keywords

    def _completed(self, given: tuple[Any, dict[str, Any]] | None, model: nn.Module) -> Any:
        """Class and keywords of our optimizers, with what they need to know of the model, and as virtual workers."""
        made, keywords = given or self.get_optimizer_cls_and_kwargs(self.args, model)
        method = method_of(made) if isinstance(made, type) else None
        if self._named_ours or method is not None:
            self._refuse_loaded_in_shards()
        keywords = dict(keywords)  # the parent takes some out
        if method is not None and method.takes_hidden_matrices and (given is None or "params" not in keywords):
            of_parent = None if given else keywords.pop("optimizer_dict", keywords.pop("params", None))
            keywords["params"] = self._hidden_groups(model, of_parent)
        if self._virtual_workers == 1:
            # The parent asks for both itself, if it is given none, and may make param groups of its own.
            asks = given is None and "process_group" in keywords and "params" not in keywords
            if method is None or asks:
                return given
            return made, {"process_group": voting_group(self.accelerator), **keywords}
        if self._local_steps:
            made = in_local_steps(self._inner(made, keywords, method), local_steps_options(self.args))
        elif method is None:
            return given
        adversaries = {"adversaries": self.args.adversaries, "adversary": self.args.adversary}
        return VirtualWorkers, {"workers": self._virtual_workers, "method": made, **adversaries, **keywords}

    def _inner(self, made: Any, keywords: dict[str, Any], method: Method | None) -> Any:
        """What makes the inner optimizer of a virtual worker from param groups.

        Raises:
            ValueError: it wants the model, or param groups that are made for it.
        """
        if method is None and not (isinstance(made, type) and not {"params", "model", "optimizer_dict"} & {*keywords}):
            raise ValueError(
                f"virtual_workers={self._virtual_workers} with local_steps and optim={self.args.optim!r}: that "
                "optimizer is made for the parameters of the one model. Start as many processes, or take another one."
            )
        return made

    def _refuse_loaded_in_shards(self) -> None:
        if getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                f"optim={self.args.optim!r} with a model that was loaded in shards (DistributedConfig): its gradients "
                "would be averaged over all of them. Load it whole, and let accelerate shard it: "
                "examples/launch/sharded_replicas.yaml."
            )

    def _hidden_groups(self, model: nn.Module, given: Any) -> list[dict[str, Any]]:
        """Of all parameters, or of param groups that are given."""
        decayed = set(self.get_decay_parameter_names(model))  # type: ignore[attr-defined]
        groups = hidden_matrices(model, decayed=decayed)
        if given is not None:
            return split_by_hidden(given, groups)
        # Without the names, which groups that a callback adds would have to have, too.
        return [
            {"weight_decay": self.args.weight_decay, **group, "params": [parameter for _, parameter in group["params"]]}
            for group in groups
        ]

    def _wrap_model(self, model: nn.Module, training: bool = True, *args: Any, **kwargs: Any) -> nn.Module:
        # Here the optimizer is there, wherever it comes from, and the model is not in DDP yet.
        if training:
            self._warn_of_what_is_not_called()
            self._check_optimizer()
            if not self._steps_made:  # else the weights of a checkpoint are in the model by now
                self._end_round()  # of a training that was stopped: DDP makes all models that of rank 0
            self._begin_votes()
            if self._exchanges and getattr(self.args, "enable_jit_checkpoint", False):
                from .preemption import agree_on_checkpoints  # needs a module that transformers 4 does not have

                agree_on_checkpoints(self)
        return super()._wrap_model(model, training, *args, **kwargs)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the parent; only a checkpoint that is whole is resumed from (:mod:`hf_dlion.checkpoint`).

        Raises:
            CheckpointError: the checkpoint given is not whole; with True, none in the output folder is.
            WorkerLostError: a collective failed; with the ranks that did not answer.
        """
        self._steps_made = 0
        if self._has_virtual_workers():
            self._own_optimizer().forget_turns()  # of a training that was stopped, before weights are loaded
        if resume_from_checkpoint:
            resume_from_checkpoint = self._resumed(resume_from_checkpoint)
        with report_lost_workers("training", waits=False) if self._exchanges else nullcontext():
            output: TrainOutput = super().train(resume_from_checkpoint, *args, **kwargs)  # type: ignore[misc]
            self._end_round()
        if self._exchanges:
            drain_gloo()  # so that accelerator.end_training() may follow at once
        return output

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """As the parent; a run that has made all its steps has no epoch left.

        Raises:
            ValueError: the ranks would make different numbers of steps, and wait for each other; raised on all ranks.
        """
        epochs, steps_an_epoch, *rest, steps = super().set_initial_training_values(*args, **kwargs)  # type: ignore[misc]
        if self._exchanges:
            self._check_equally_many(steps, steps_an_epoch)
        if 0 < steps <= self._steps_made:
            epochs = self._steps_made // steps_an_epoch  # transformers would begin the next, and step once in it
        return epochs, steps_an_epoch, *rest, steps

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_training_stop:
            self._end_round()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.control.should_training_stop:  # by what was evaluated
            self._end_round()

    def _load_best_model(self) -> None:
        self._end_round()
        super()._load_best_model()  # type: ignore[misc]

    def _end_round(self) -> None:
        """The last round of local steps ends where the training does, however long it is."""
        if self._gradients_stay_local:
            self._own_optimizer().vote()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the parent; between two votes of local steps, of the parameters of the last vote."""
        with self._voted_parameters():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As the parent; by the parameters that :meth:`evaluate` takes."""
        with self._voted_parameters():
            return super().predict(*args, **kwargs)  # type: ignore[misc]

    def _check_processes(self, method: str) -> None:
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{method} with {self.args.n_gpu} GPUs in one process (nn.DataParallel): a process is one worker and "
                "has one vote. Start one process per GPU: `accelerate launch --multi_gpu script.py`."
            )
        if self._virtual_workers > 1 and self.args.world_size > 1:
            raise ValueError(
                f"virtual_workers={self._virtual_workers} in {self.args.world_size} processes: virtual workers are "
                "all in one. Start one process, or leave virtual_workers out."
            )
        if self.args.use_cpu and dist.is_initialized():
            # transformers 5.23 gives a process group on the CPU no time limit of its own, whatever ddp_timeout says.
            dist.distributed_c10d._set_pg_timeout(self.args.ddp_timeout_delta)

    def _keep_gradients_local(self) -> None:
        named = self._named_ours
        self._check_processes(f"optim={self.args.optim!r}" if named else f"A {type(self._own_optimizer()).__name__}")
        keep_gradients_local(self.accelerator)

    def _check_optimizer(self) -> None:
        """While gradients stay on their worker, only our optimizers may step; where they do not, only others."""
        self._refuse_own_optimizer()
        workers = len(members_of(self.optimizer))
        if self._local_steps and not (workers and all(member.inner for member in members_of(self.optimizer))):
            raise ValueError(
                f"local_steps={self._local_steps}, and an optimizer of class {type(self._own_optimizer()).__name__}, "
                "which is no LocalSteps, was given. Make it hf_dlion.LocalSteps around its inner one, or leave it out, "
                "and the Trainer makes it."
            )
        if self._named_ours and not workers:
            raise ValueError(
                f"optim={self.args.optim!r}, and an optimizer of class {type(self._own_optimizer()).__name__} was "
                "given: no worker would learn from the others. Leave it out, or take the optim of transformers that "
                "it is."
            )
        if workers and workers != self._virtual_workers:
            raise ValueError(
                f"virtual_workers={self._virtual_workers}, and an optimizer of {workers} in this process was given. "
                "Say virtual_workers and optim as it has them, and make it hf_dlion.optim.virtual.VirtualWorkers where "
                "they are several; or leave the optimizer out, and the Trainer makes it."
            )

    def _begin_votes(self) -> None:
        """As a training begins: our optimizer gets the model's names for its errors, and counts from here on."""
        optimizer = self._own_optimizer()
        if self._gradient_votes:
            if self.args.world_size == 1:
                self._begin_turns()
            self._count_from_here()
        if not members_of(optimizer):
            return
        if not isinstance(self.accelerator.ddp_handler, LocalGradients):
            self._keep_gradients_local()
        if self.args.average_tokens_across_devices:  # as with our names: DLionArgumentsMixin
            self.args.average_tokens_across_devices = False
        names: dict[Any, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        found = [names.get(parameter, "") for parameter in all_parameters(optimizer)]
        for member in members_of(optimizer):
            member.parameter_names = found
        if self._has_virtual_workers():
            optimizer.forget_turns()
            self._warn_of_unseen_gradients()
        self._count_from_here()

    def _check_equally_many(self, steps: int, steps_an_epoch: int) -> None:
        if self.args.world_size == 1:
            return
        everyone: list[Any] = [None] * self.args.world_size
        dist.all_gather_object(everyone, (steps, steps_an_epoch))
        strategies = (self.args.logging_strategy, self.args.eval_strategy, self.args.save_strategy)
        by_epoch = any(getattr(strategy, "value", strategy) == "epoch" for strategy in strategies)
        if len({own if by_epoch else own[0] for own in everyone}) > 1:
            raise ValueError(
                f"the ranks would not come equally often, and would wait for each other: by rank, {everyone} are the "
                "steps of the training and of an epoch, since their data loaders have other lengths. Let "
                "accelerator.prepare deal out one dataset, cut the loaders to one length, or set max_steps and no "
                "strategy to epoch."
            )


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
