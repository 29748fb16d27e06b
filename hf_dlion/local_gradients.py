"""Gradients that stay on their worker.

accelerate calls ``ddp_handler.register_comm_hook(model)`` right after it has wrapped a model in
``DistributedDataParallel``; a handler that registers a hook which communicates nothing keeps all else that DDP does:
it sends rank 0's parameters to all, and it finds unused parameters.

Where replicas are sharded, accelerate gives ``fully_shard`` the dimensions of its mesh that ``ParallelismConfig`` names
in ``fsdp_dim_names``. Without that of the replicas, FSDP2 reduces gradients inside a replica, and they stay there.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

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
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

if not (compare_versions("accelerate", ">=", "1.10") and compare_versions("accelerate", "<", "2")):
    raise ImportError("accelerate>=1.10,<2 is required: how it wraps a model in DDP is known of these versions.")

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
        model.register_comm_hook(None, noop_hook)


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

    With FSDP2 and a ``parallelism_config`` of several replicas, a replica is a worker: its ranks reduce their gradients
    among themselves. The optimizer then votes with ``accelerator.torch_device_mesh["dp_replicate"].get_group()`` as its
    ``process_group``.

    Args:
        target: the accelerator that will wrap the model, or the wrapped model.

    Raises:
        ValueError: the accelerator shards or replicates by other means than DDP, already compresses the gradients by
            a communication hook, or has prepared a model.
    """
    if isinstance(target, DistributedDataParallel):
        target.register_comm_hook(None, noop_hook)
        return
    if not isinstance(target, Accelerator):
        raise TypeError(
            f"keep_gradients_local takes an accelerate.Accelerator or a DistributedDataParallel module, and was given "
            f"a {type(target).__name__}. Without DDP gradients are local already."
        )
    check_supported(target)
    handler = target.ddp_handler or DistributedDataParallelKwargs()
    if handler.comm_hook != DDPCommunicationHookType.NO:
        raise ValueError(
            f"DDP was given the communication hook {handler.comm_hook.value!r}, which reduces gradients; Distributed "
            "Lion needs them as they are. Leave comm_hook out of DistributedDataParallelKwargs."
        )
    if target._models and target.num_processes > 1:
        raise ValueError(
            "this accelerator has already prepared a model, whose gradients it will average. Call "
            "keep_gradients_local(accelerator) before accelerator.prepare(model)."
        )
    config = target.parallelism_config
    if voting_group(target) is not None and not isinstance(config, SeparateReplicas):
        kept = SeparateReplicas(**{f.name: getattr(config, f.name) for f in fields(config)})
        kept.device_mesh = config.device_mesh
        target.state.parallelism_config = kept
    target.ddp_handler = LocalGradients(**{f.name: getattr(handler, f.name) for f in fields(handler)})


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
