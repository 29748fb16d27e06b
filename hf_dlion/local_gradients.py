"""Gradients that stay on their worker.

accelerate calls ``ddp_handler.register_comm_hook(model)`` right after it has wrapped a model in
``DistributedDataParallel``. DDP has sent rank 0's parameters to all by then; from here on, it is kept from touching the
gradients, as inside its ``no_sync()``: a parameter that a worker's backward does not reach has no gradient there.

Where replicas are sharded, accelerate gives ``fully_shard`` the dimensions of its mesh that ``ParallelismConfig`` names
in ``fsdp_dim_names``. Without that of the replicas, FSDP2 reduces gradients inside a replica, and they stay there.
"""

from __future__ import annotations

import logging
import os
import weakref
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    compare_versions,
    parse_flag_from_env,
)
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .optim.states import all_parameters
from .optim.workers import WorkersOptimizer, members_of

if not (compare_versions("accelerate", ">=", "1.10") and compare_versions("accelerate", "<", "2")):
    raise ImportError("accelerate>=1.10,<2 is required: how it wraps a model in DDP is known of these versions.")

logger = logging.getLogger(__name__)

_REPLICAS = "dp_replicate"

_SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_XPU,
    DistributedType.MULTI_NPU,
}


class LocalGradients(DistributedDataParallelKwargs):
    """DDP options under which the gradients are not reduced."""

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        """Called by accelerate with the wrapped model."""
        _keep_local(model)


class SeparateReplicas(ParallelismConfig):
    """A mesh of replicas and shards on which FSDP2 knows of the shards only."""

    @property
    def fsdp_dim_names(self) -> list[str]:
        """Names of the dimensions over which a model is sharded."""
        return [name for name in super().fsdp_dim_names if name != _REPLICAS]


def keep_gradients_local(target: Accelerator | DistributedDataParallel) -> None:
    """Keep every worker's gradients to itself, so that the workers can vote.

    Call it with the ``Accelerator`` before ``accelerator.prepare(model)``, or with a DDP module before its first
    backward. Gradient accumulation works as ever. ``DLionTrainer`` does this by itself.

    Every trainable parameter of the model must then be one of an optimizer of this package: the step of another one
    raises, and so does the second step, or the second after parameters were unfrozen, if a parameter with a gradient is
    in none. DDP goes on sending rank 0's buffers to all, but for those that are not part of the state dict (masks,
    rotary frequencies): they are constants.

    With FSDP2 and a ``parallelism_config`` of several replicas, a replica is a worker: its ranks reduce their gradients
    among themselves. The optimizer then votes with ``accelerator.torch_device_mesh["dp_replicate"].get_group()`` as its
    ``process_group``.

    Args:
        target: the accelerator that will wrap the model, or the wrapped model.

    Raises:
        ValueError: the accelerator shards or replicates by other means than DDP, already compresses the gradients by
            a communication hook, has prepared a model, or sees one process where several were launched.
    """
    if isinstance(target, DistributedDataParallel):
        _keep_local(target)
        return
    if not isinstance(target, Accelerator):
        raise TypeError(
            f"keep_gradients_local takes an accelerate.Accelerator or a DistributedDataParallel module, and was given "
            f"a {type(target).__name__}. Without DDP gradients are local already."
        )
    handler = taken_over(target, "keep_gradients_local", LocalGradients)
    config = target.parallelism_config
    if voting_group(target) is not None and not isinstance(config, SeparateReplicas):
        kept = SeparateReplicas(**{f.name: getattr(config, f.name) for f in fields(config)})
        kept.device_mesh = config.device_mesh
        target.state.parallelism_config = kept
    if voting_group(target) is not None:
        separated.add(target)
    target.ddp_handler = LocalGradients(**{f.name: getattr(handler, f.name) for f in fields(handler)})


def taken_over(
    accelerator: Accelerator, caller: str, kind: type[DistributedDataParallelKwargs]
) -> DistributedDataParallelKwargs:
    """The DDP options of an accelerator whose handler is to be replaced by ours.

    Args:
        accelerator: that has not wrapped a model yet.
        caller: the function, for errors.
        kind: the handler that takes its place.

    Raises:
        ValueError: as :func:`keep_gradients_local`.
    """
    check_supported(accelerator)
    _check_launch(accelerator)
    handler = accelerator.ddp_handler or DistributedDataParallelKwargs()
    if handler.comm_hook != DDPCommunicationHookType.NO:
        raise ValueError(
            f"DDP was given the communication hook {handler.comm_hook.value!r}, which reduces gradients; Distributed "
            "Lion needs them as they are. Leave comm_hook out of DistributedDataParallelKwargs."
        )
    registered_by = type(handler).register_comm_hook
    if registered_by not in (DistributedDataParallelKwargs.register_comm_hook, kind.register_comm_hook):
        raise ValueError(
            f"{caller} was called, and the accelerator's DDP handler is a {type(handler).__name__} already, with a "
            "communication hook of its own; DDP takes one. Call either keep_gradients_local, with an optimizer of "
            "hf_dlion, or vote_gradients, with any other."
        )
    if accelerator._models and accelerator.num_processes > 1:
        raise ValueError(
            "this accelerator has already prepared a model, whose gradients it will average. Call "
            f"{caller}(accelerator) before accelerator.prepare(model)."
        )
    return handler


def check_hook_is_free(module: DistributedDataParallel, caller: str) -> None:
    """Raise ValueError where a DDP module has a communication hook."""
    if module._comm_hooks:
        hook, _ = module._comm_hooks[0]
        raise ValueError(
            f"{caller} was given a module that has a communication hook already ({hook.__module__}.{hook.__name__}), "
            "and DDP takes one. Call either keep_gradients_local, with an optimizer of hf_dlion, or vote_gradients, "
            "with any other, once, and register no other hook."
        )


def _check_launch(accelerator: Accelerator) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1")) if dist.is_torchelastic_launched() else 1
    world = dist.get_world_size() if dist.is_initialized() else launched
    if accelerator.num_processes != world:
        raise ValueError(
            f"{world} processes were launched together, and this Accelerator knows of {accelerator.num_processes}: "
            "each would train for itself, on all of the data. On a machine without GPUs, make it by "
            "Accelerator(cpu=True); with a Trainer, pass --use_cpu."
        )


_local_modules: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
separated: weakref.WeakSet[Accelerator] = weakref.WeakSet()
"""Those that shard a model inside each replica."""
voted_on: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""The modules whose gradients become the same on all replicas by :func:`hf_dlion.vote_gradients`."""
_trained: weakref.WeakKeyDictionary[Optimizer, tuple[int, list[Any]]] = weakref.WeakKeyDictionary()
"""Of an optimizer, how many steps it has made since it, or what of the modules is trained, last changed; and that."""
_inner: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _keep_local(module: DistributedDataParallel) -> None:
    check_hook_is_free(module, "keep_gradients_local")
    module.require_backward_grad_sync = False
    module.static_graph = False  # its first backward would call a reducer that was not prepared
    module.register_comm_hook(None, noop_hook)  # where accelerate's trigger_sync_in_backward turns it on again
    module.register_forward_pre_hook(refuse_join)
    kept = module.module.state_dict(keep_vars=True)
    module.parameters_to_ignore |= {name for name, _ in module.module.named_buffers() if name not in kept}
    module.modules_buffers = [b for b in module.modules_buffers if any(b is tensor for tensor in kept.values())]
    if module.modules_buffers:
        module.register_forward_hook(_send_buffers)
        sent = sum(buffer.nbytes for buffer in module.modules_buffers)
        votes = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad) // 8
        if sent > votes:
            logger.warning(
                "DDP sends %d bytes of buffers at every forward, and votes are %d. If the workers may keep their own, "
                "wrap the model with broadcast_buffers=False.",
                sent,
                votes,
            )
    _local_modules.add(module)


def refuse_join(module: DistributedDataParallel, inputs: object) -> None:
    """Before a forward: raise RuntimeError inside of torch's Join."""
    if module._join_config.enable:
        raise RuntimeError(
            "torch's Join (accelerate's join_uneven_inputs) and votes do not go together: a rank without data would "
            "not come to the vote, and the others would wait for it. Give every rank as many batches: accelerate's "
            "data loaders do (even_batches), or leave the rest of an epoch out (drop_last)."
        )


def _send_buffers(module: DistributedDataParallel, inputs: object, outputs: object) -> None:
    module.require_forward_param_sync = torch.is_grad_enabled()  # as DDP sets it, but in no_sync()


def _check_votes(optimizer: Optimizer, args: object, keywords: object) -> None:
    """Before any optimizer's step: whether it votes on the parameters whose gradients nobody averages."""
    trains = [[parameter.requires_grad for parameter in module._module_parameters] for module in _local_modules]
    trains.append([len(group["params"]) for group in optimizer.param_groups])
    steps, before = _trained.get(optimizer, (0, []))
    steps = steps + 1 if trains == before else 1
    _trained[optimizer] = steps, trains
    _inner.update(member.inner for member in members_of(optimizer) if member.inner is not None)
    if steps > 2 or optimizer in _inner:
        return
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not members_of(optimizer):
        _check_shards_are_voted_on(optimizer, own)
    for module in _local_modules:
        trained = {id(p): (name, p) for name, p in module.module.named_parameters() if p.requires_grad}
        if dist.get_world_size(module.process_group) == 1 or not own & trained.keys():
            continue
        if not members_of(optimizer):
            name = next(name for key, (name, _) in trained.items() if key in own)
            raise RuntimeError(
                f"{type(optimizer).__name__} would step {name} with the gradient of this worker alone, and the "
                "replicas would come apart: keep_gradients_local leaves averaging to the votes. Give the parameter to "
                "an optimizer of hf_dlion, or leave keep_gradients_local out."
            )
        # Others of ours may step less often, a generator's say, and not have stepped yet.
        voted = own.union(*({id(p) for p in all_parameters(other)} for other in WorkersOptimizer.living))
        left = [name for key, (name, p) in trained.items() if key not in voted and p.grad is not None]
        if steps == 2 and left:
            raise RuntimeError(
                f"{left[0]} is trained, and in no optimizer of hf_dlion, so nobody votes on its gradient"
                f"{f', nor on those of {len(left) - 1} more' * (len(left) > 1)}. Give it to the optimizer, or freeze "
                "it: requires_grad_(False)."
            )
        for member in members_of(optimizer):
            if not any("param_names" in group for group in member.param_groups):
                names = {id(p): name for name, p in module.module.named_parameters()}
                member.parameter_names = [names.get(id(parameter), "") for parameter in all_parameters(member)]


def _check_shards_are_voted_on(optimizer: Optimizer, own: set[int]) -> None:
    """Raise RuntimeError if it would step shards that nobody makes the same on all replicas; of ids of parameters."""
    for accelerator in separated:
        left = own & {id(parameter) for model in accelerator._models for parameter in model.parameters()}
        if left - {id(parameter) for module in voted_on for parameter in module.parameters()}:
            raise RuntimeError(
                f"{type(optimizer).__name__} would step the shards of a replica with the gradients of this replica "
                "alone, and the replicas would come apart: keep_gradients_local leaves averaging to the votes. Take an "
                "optimizer of hf_dlion, or call vote_gradients(model, process_group=...) after accelerator.prepare."
            )


register_optimizer_step_pre_hook(_check_votes)


def voting_group(accelerator: Accelerator) -> dist.ProcessGroup | None:
    """The ranks that vote with this one where replicas are sharded; None, where each rank is a worker."""
    config = accelerator.parallelism_config
    if accelerator.distributed_type != DistributedType.FSDP or config is None:
        return None
    group: dist.ProcessGroup = accelerator.torch_device_mesh[_REPLICAS].get_group()
    return group


def check_supported(accelerator: Accelerator) -> None:
    """Raise ValueError where a worker would not have a gradient of its own."""
    kind = accelerator.distributed_type
    parallel = accelerator.parallelism_config
    sharded = parallel is not None and parallel.total_size > parallel.dp_replicate_size
    if kind == DistributedType.MULTI_CPU and parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise ValueError(
            "Distributed Lion was asked to run under FSDP on CPUs, where accelerate would leave it out: it shards "
            "on GPUs only. Leave it out yourself, or call torch's fully_shard in a loop of your own."
        )
    if kind in _SUPPORTED and not sharded:
        return
    if kind == DistributedType.FSDP:
        _check_shards(accelerator.state.fsdp_plugin, parallel)
        return
    raise ValueError(
        f"Distributed Lion was asked to run under {'a sharding parallelism_config' if sharded else kind.value}, where "
        "no worker holds the whole model and its own gradient. Supported are one process per GPU "
        "(`accelerate launch --multi_gpu`), without DeepSpeed, Megatron-LM or tensor parallelism; and replicas that "
        "FSDP2 shards, on GPUs: examples/launch/sharded_replicas.yaml."
    )


def _check_shards(plugin: Any, parallel: ParallelismConfig | None) -> None:
    """Raise ValueError unless FSDP2 is to shard several replicas, and nothing else is."""
    where = "The file to start from is examples/launch/sharded_replicas.yaml."
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "Distributed Lion was asked to run under FSDP version 1, which keeps all parameters of a layer in one. Set "
            f"fsdp_version to 2. {where}"
        )
    if getattr(plugin, "cpu_ram_efficient_loading", False) and compare_versions("accelerate", "<", "1.11"):
        raise ValueError(
            "Distributed Lion was asked to run under FSDP2 with fsdp_cpu_ram_efficient_loading, and accelerate before "
            "1.11 then sends the weights inside the first replica only. Update accelerate, or set it to false."
        )
    sizes = (1, 1) if parallel is None else (parallel.dp_replicate_size, parallel.dp_shard_size)
    if min(sizes) < 2:
        raise ValueError(
            f"Distributed Lion was asked to run under FSDP2 with dp_replicate_size={sizes[0]} and "
            f"dp_shard_size={sizes[1]}. A replica is one worker: give parallelism_config how many replicas vote, at "
            f"least 2, and over how many GPUs each is sharded; with 1, leave FSDP out. {where}"
        )
    if parallel is not None and parallel.total_size > parallel.data_parallel_size:
        raise ValueError(
            "Distributed Lion was asked to run under FSDP2 with tensor, context or sequence parallelism. Leave these "
            f"out of parallelism_config. {where}"
        )
