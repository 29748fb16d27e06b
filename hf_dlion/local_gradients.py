"""Gradients that stay on their worker.

accelerate calls ``ddp_handler.register_comm_hook(model)`` right after it has wrapped a model in
``DistributedDataParallel``; a handler that registers a hook which communicates nothing keeps all else that DDP does:
it sends rank 0's parameters to all, and it finds unused parameters.
"""

from __future__ import annotations

from dataclasses import fields

from accelerate import Accelerator
from accelerate.utils import (
    DDPCommunicationHookType,
    DistributedDataParallelKwargs,
    DistributedType,
    compare_versions,
)
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.nn.parallel import DistributedDataParallel

if not (compare_versions("accelerate", ">=", "1.10") and compare_versions("accelerate", "<", "2")):
    raise ImportError("accelerate>=1.10,<2 is required: how it wraps a model in DDP is known of these versions.")

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


def keep_gradients_local(target: Accelerator | DistributedDataParallel) -> None:
    """Keep every worker's gradients to itself, so that the workers can vote.

    Call it with the ``Accelerator`` before ``accelerator.prepare(model)``, or with a DDP module before its first
    backward. Gradient accumulation works as ever. ``DLionTrainer`` does this by itself.

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
    target.ddp_handler = LocalGradients(**{f.name: getattr(handler, f.name) for f in fields(handler)})


def check_supported(accelerator: Accelerator) -> None:
    """Raise ValueError where the gradients of a worker are not whole tensors of its own."""
    kind = accelerator.distributed_type
    parallel = accelerator.parallelism_config
    sharded = parallel is not None and parallel.total_size > parallel.dp_replicate_size
    if kind in _SUPPORTED and not sharded:
        return
    raise ValueError(
        f"Distributed Lion was asked to run under {'a sharding parallelism_config' if sharded else kind.value}, where "
        "no worker holds the whole model and its own gradient. Supported is plain data parallelism: one process per "
        "GPU (`accelerate launch --multi_gpu`), without DeepSpeed, FSDP, Megatron-LM or tensor parallelism."
    )
