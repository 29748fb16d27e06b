"""The figures of a training run, from the Trainer that ran it."""

from __future__ import annotations

import math
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import Trainer

from ..optim.tensors import local
from ..optim.workers import members_of
from ..wire.ledger import fp32_all_reduce_bytes
from .arguments import DLionArgumentsMixin
from .methods import METHODS, name_of

_PACKAGES = ("hf-dlion", "torch", "transformers", "accelerate", "datasets", "peft")
TEXT_GENERATION = "text-generation"
# transformers' name of a model's loss: the hub's name of its task
_CLASSIFICATION = {"ForImageClassification": "image-classification", "ForSequenceClassification": "text-classification"}
_OF_LOCAL_STEPS = {
    "every": "local_steps",
    "outer_lr": "outer_learning_rate",
    "outer_momentum": "outer_momentum",
    "nesterov": "outer_nesterov",
    "fragments": "local_fragments",
    "delay": "local_delay",
    "aggregation": "outer_aggregation",
    "tie": "tie",
    "exchange": "exchange",
}
"""Options of ``LocalSteps`` by the names that the report has for them."""
_MAX_EXPONENT = 700.0  # of what a float can hold: the perplexity of a run that blew up


def run_report(trainer: Trainer, loss_key: str = "eval_loss") -> dict[str, Any]:
    """What a run was, and what came of it, as JSON takes it.

    Args:
        trainer: after ``train()``.
        loss_key: entry of its log with the validation loss, in nats: per token, or per row of a classifier.

    Returns:
        Settings, losses (of the whole history of a resumed run), seconds of ``train()``, versions, the command of this
        process, and the bytes that this rank handed to collectives for the ``bytes_counted_steps`` of this process,
        beside those of an fp32 all-reduce. None where there is no figure: bytes of transformers' own optimizers, a
        validation loss without validation, the perplexity of a classifier, an accuracy that no metric of the Trainer
        measured.
    """
    args = trainer.args
    task = _CLASSIFICATION.get(str(getattr(trainer.model, "loss_type", None)), TEXT_GENERATION)
    return {
        "task": task,
        "method": name_of(trainer.optimizer) or method_name(args),
        "gradient_votes": getattr(args, "gradient_votes", None),
        "method_options": method_options(args, trainer.optimizer),
        "workers": _workers(trainer),
        "virtual_workers": _virtual_workers(args),
        "processes": args.world_size,
        "adversaries": getattr(args, "adversaries", 0),
        "trainable_parameters": trainable_parameters(trainer),
        "steps": trainer.state.global_step,
        "rows_per_step": trainer.get_total_train_batch_size(args),
        **_results(trainer.state.log_history, loss_key, per_token=task == TEXT_GENERATION),
        **_traffic(trainer),
        "learning_rate": args.learning_rate,
        "lr_scheduler": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "warmup_steps": args.get_warmup_steps(trainer.state.max_steps),
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "precision": {"no": "fp32"}.get(precision := trainer.accelerator.mixed_precision, precision),
        "seed": args.seed,
        "command": shlex.join(sys.argv),
        "versions": {"python": platform.python_version(), **_versions()},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_device(args.device)}",
    }


def method_name(args: Any) -> str:
    """The name that was given as ``optim``."""
    return str(getattr(args.optim, "value", args.optim))


def method_options(args: Any, optimizer: Any = None) -> dict[str, Any]:
    """What an optimizer of ours is made with, here or elsewhere; of others, what Adam takes, if they are named so.

    With local steps, those of the inner one, and theirs.
    """
    for worker in members_of(optimizer)[:1]:
        if worker.inner is None:
            return _made_with(args, worker, name_of(optimizer))
        inner = _made_with(args, worker.inner, name_of(optimizer)) if members_of(worker.inner) else _named(args)
        given = {**worker.defaults, **worker.options()}
        return {**inner, **{name: given[key] for key, name in _OF_LOCAL_STEPS.items() if key in given}}
    return _named(args)


def _made_with(args: Any, worker: Any, name: str | None) -> dict[str, Any]:
    made_with = {**worker.defaults, **worker.options()}
    method = METHODS.get(name or "")
    if method is None or not isinstance(args, DLionArgumentsMixin):
        return made_with
    arguments: Any = args
    known = {"lr": arguments.learning_rate, **method.fixed, **method.options(arguments)}
    return {option: made_with.get(option, getattr(worker, option, value)) for option, value in known.items()}


def _named(args: Any) -> dict[str, Any]:
    """What belongs to the name that was given."""
    name = method_name(args)
    if name in METHODS:
        return METHODS[name].keywords(args)
    if "adam" in name:
        return {"betas": [args.adam_beta1, args.adam_beta2], "eps": args.adam_epsilon}
    return {}


def trainable_parameters(trainer: Trainer) -> int:
    """How many numbers a worker's gradient has."""
    return sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)


def _results(history: list[dict[str, Any]], loss_key: str, per_token: bool) -> dict[str, float | None]:
    def all_of(key: str) -> list[float]:
        return [entry[key] for entry in history if key in entry]

    def last(values: list[float]) -> float | None:
        return values[-1] if values else None

    validation = all_of(loss_key)
    return {
        "train_loss": last(all_of("loss")),
        "validation_loss_first": validation[0] if validation else None,
        "validation_loss_last": last(validation),
        "validation_perplexity": math.exp(min(validation[-1], _MAX_EXPONENT)) if validation and per_token else None,
        "validation_accuracy": last(all_of(f"{loss_key.removesuffix('loss')}accuracy")),
        "seconds": last(all_of("train_runtime")),
    }


def _traffic(trainer: Trainer) -> dict[str, Any]:
    counting = _counting(trainer)
    ledger = counting.ledger if counting else None
    sent = ledger.sent_bytes if ledger else None
    steps = ledger.steps if ledger else trainer.state.global_step
    dense = round(fp32_all_reduce_bytes(_held_parameters(trainer), _workers(trainer)) * steps)
    return {
        "bytes_counted_steps": steps,
        "bytes_sent": sent,
        "bytes_received": ledger.received_bytes if ledger else None,
        "bytes_fp32_allreduce": dense,
        "fp32_allreduce_over_sent": dense / sent if sent else None,
    }


def _virtual_workers(args: Any) -> int:
    return int(getattr(args, "virtual_workers", 1))


def _workers(trainer: Trainer) -> int:
    """N; of sharded replicas, each is one."""
    counting = _counting(trainer)
    return int(counting.workers if counting else trainer.args.world_size * _virtual_workers(trainer.args))


def _counting(trainer: Trainer) -> Any:
    """What counts the bytes of this process, and knows N; None with transformers' own exchange."""
    return getattr(trainer, "voting", None) or next(iter(members_of(trainer.optimizer)), None)


def _held_parameters(trainer: Trainer) -> int:
    """How many this process trains: of a sharded replica, those of its shard."""
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return sum(local(parameter).numel() for parameter in trained)


def _device(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
