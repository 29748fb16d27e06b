"""Votes as a communication hook: what reaches the optimizer is what the workers' signs decide."""

# No `from __future__ import annotations`: DDP reads those of the hook, and they must be classes.
import logging
import weakref
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .gradient_buckets import Buckets, Conversations, ShardedBuckets
from .local_gradients import check_hook_is_free, refuse_join, separated, taken_over, voted_on, voting_group
from .optim.signed_gradients import SignedGradients, check_options
from .optim.tensors import local, shard_group
from .optim.workers import members_of
from .wire.collectives import ProcessChannel
from .wire.groups import rank_in
from .wire.ledger import Ledger

logger = logging.getLogger(__name__)


class VotedGradients(DistributedDataParallelKwargs):
    """DDP options under which the workers vote on the gradients.

    Attributes:
        options: as of :class:`SignedGradients`.
        votes: by model that was wrapped, this worker's part in the votes.
    """

    # Not in __dict__, which accelerate takes for DDP's keywords.
    __slots__ = ("options", "votes")

    options: dict[str, Any]
    votes: list[SignedGradients]

    def register_comm_hook(self, model: DistributedDataParallel) -> None:
        """Called by accelerate with the wrapped model."""
        self.votes.append(_vote_on(model, self.options))


def vote_gradients(
    target: Accelerator | nn.Module,
    aggregation: str = "avg",
    *,
    dither: bool = True,
    exchange: str = "auto",
    on_bad_gradient: str = "abstain",
    scaler: torch.amp.GradScaler | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> SignedGradients | None:
    """Let the workers vote on the gradients, in place of averaging them: one bit a parameter, for any optimizer.

    Call it with the ``Accelerator`` before ``accelerator.prepare(model)``, or with a DDP module before its first
    backward, or with a module that ``fully_shard`` has sharded inside each replica. After backward, the gradients of
    all workers are what they decided, from -1 to 1 (:class:`hf_dlion.optim.signed_gradients.SignedGradients`): for
    optimizers that are free of scale. Their norm grows with the root of the number of parameters, so clipping at 1
    makes all steps equally large.
    With gradient accumulation, the votes are on the sum of a step (``accelerator.accumulate``, DDP's ``no_sync``, or
    FSDP2's ``set_requires_gradient_sync``).

    Sharded replicas vote shard by shard: noise is drawn, and a bad gradient found, in what a rank holds.

    Args:
        target: the accelerator that will wrap the model, or the wrapped model.
        aggregation: ``"avg"``, the mean of the signs, or ``"mavo"``, their majority.
        dither: whether noise is added before the sign is taken, so that the votes say how large a gradient is.
        exchange: how votes travel, as of :class:`hf_dlion.DistributedLion`.
        on_bad_gradient: ``"abstain"``, a worker has no vote on a bucket in which its gradient has a NaN or Inf;
            ``"raise"``, all ranks raise; of a sharded module, those that hold that shard.
        scaler: a gradient scaler, if there is one; it gets to see a bad gradient on all ranks, and
            ``on_bad_gradient`` is not asked. An accelerator has its own.
        process_group: of a sharded module, the ranks that hold the same shards in the other replicas,
            ``mesh["dp_replicate"].get_group()``; DDP has its own.

    Returns:
        Of a module, this worker's part, with the ``ledger`` and the ``step``, which a loop that resumes may set. Of
        an accelerator, None: its ``ddp_handler.votes`` has one for each model that it has wrapped.

    Raises:
        ValueError: gradients are reduced by other means than DDP, or by a hook already; the accelerator has prepared a
            model, shards it, or sees one process where several were launched; an option is not known, or does not go
            with the target.
        TypeError: the target is something else.
    """
    check_options(aggregation, exchange, on_bad_gradient)
    options: dict[str, Any] = {"aggregation": aggregation, "dither": dither, "exchange": exchange}
    options |= {"on_bad_gradient": on_bad_gradient, "scaler": scaler}
    return _begin(target, process_group, options)


def _begin(target: object, group: dist.ProcessGroup | None, options: dict[str, Any]) -> SignedGradients | None:
    if isinstance(target, nn.Module) and not isinstance(target, DistributedDataParallel):
        if _is_sharded(target):
            return _vote_on_shards(target, group, options)
    elif group is not None:
        raise ValueError(
            f"vote_gradients was given a process_group with a {type(target).__name__}, which has its own. Leave it "
            "out; it is for a module that fully_shard has sharded."
        )
    if isinstance(target, DistributedDataParallel):
        return _vote_on(target, options)
    if not isinstance(target, Accelerator):
        raise TypeError(
            "vote_gradients takes an accelerate.Accelerator, a DistributedDataParallel module or one that fully_shard "
            f"has sharded, and was given a {type(target).__name__}."
        )
    _prepare_votes(target, options)
    return None


def _is_sharded(module: nn.Module) -> bool:
    for part in module.modules():
        reshard = getattr(part, "reshard", None)
        if callable(reshard):  # of FSDP2, which after a forward alone leaves whole parameters there
            reshard()
    for parameter in module.parameters():
        local(parameter)  # raises where it is sharded otherwise than inside of replicas
    return shard_group(list(module.parameters())) is not None


def _prepare_votes(accelerator: Accelerator, options: dict[str, Any]) -> None:
    if accelerator.num_processes == 1:
        logger.warning("vote_gradients in one process: nobody votes, and gradients stay as they are.")
    handler = taken_over(accelerator, "vote_gradients", VotedGradients)
    if voting_group(accelerator) is not None:
        raise ValueError(
            "vote_gradients was given an Accelerator that shards replicas by FSDP2: there it has to be told of the "
            "model. Call keep_gradients_local(accelerator), then accelerator.prepare(model), and then "
            'vote_gradients(model, process_group=accelerator.torch_device_mesh["dp_replicate"].get_group()).'
        )
    if accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False):
        raise ValueError(
            "vote_gradients was given an Accelerator with sync_each_batch: each micro-batch would be voted on together "
            "with the decision on the one before. Leave sync_each_batch out of GradientAccumulationPlugin."
        )
    voted = VotedGradients(**{f.name: getattr(handler, f.name) for f in fields(handler)})
    voted.options = options | {"scaler": options["scaler"] or accelerator.scaler}
    voted.votes = []
    accelerator.ddp_handler = voted


@torch.no_grad()
def _vote(state: Buckets, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """The hook."""
    return state.add(bucket)


_voting: weakref.WeakKeyDictionary[nn.Module, Conversations] = weakref.WeakKeyDictionary()
_checked: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _vote_on(module: DistributedDataParallel, options: dict[str, Any]) -> SignedGradients:
    check_hook_is_free(module, "vote_gradients")
    trained = [
        (name, parameter)
        for name, parameter in module.module.named_parameters()
        if parameter.requires_grad and name not in module.parameters_to_ignore
    ]
    parameters = [parameter for _, parameter in trained]
    votes = SignedGradients(parameters, [name for name, _ in trained], module.process_group, **options)
    buckets = _voting[module] = Buckets(votes, parameters)
    module.register_comm_hook(buckets, _vote)
    module.register_forward_pre_hook(refuse_join)
    return votes


def _vote_on_shards(module: nn.Module, group: dist.ProcessGroup | None, options: dict[str, Any]) -> SignedGradients:
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in trained]
    _check_shards(module, parameters, group, options["scaler"])
    names, held = [name for name, _ in trained], [local(parameter) for parameter in parameters]
    shards = shard_group(parameters)
    votes = SignedGradients(held, names, _of_its_own(group), shard=rank_in(shards), **options)
    buckets = _voting[module] = ShardedBuckets(votes, parameters)
    for index, parameter in enumerate(parameters):
        parameter.register_post_accumulate_grad_hook(partial(buckets.arrive, index))
    module.register_forward_pre_hook(buckets.before_forward)
    module.register_forward_hook(buckets.after_forward)
    voted_on.add(module)
    return votes


def _of_its_own(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Another one of the same ranks: several modules may vote in one backward, each in an order of its own."""
    return ProcessChannel(group, Ledger()).beside().group


def _check_shards(
    module: nn.Module, parameters: Sequence[Tensor], group: dist.ProcessGroup | None, scaler: Any
) -> None:
    """Raise ValueError where these ranks cannot vote on the shards of a module."""
    if not parameters:
        raise ValueError(
            "vote_gradients was given a module in which nothing is trained. Unfreeze what will be, then call it."
        )
    if module in _voting:
        raise ValueError(
            "vote_gradients was called for this module before. Call it once, when all is unfrozen that will be trained."
        )
    inside = set(dist.get_process_group_ranks(shard_group(parameters)))
    if group is None or inside.intersection(dist.get_process_group_ranks(group)) != {dist.get_rank()}:
        raise ValueError(
            "vote_gradients was given a module that fully_shard has sharded, and no process_group of the ranks that "
            'hold the same shards in the other replicas. Give it: process_group=mesh["dp_replicate"].get_group().'
        )
    scalers = [scaler, *(one.scaler for one in separated if any(model is module for model in one._models))]
    if any(one is not None and one.is_enabled() for one in scalers):
        raise ValueError(
            "vote_gradients was given a sharded module, and there is a gradient scaler: a bad gradient in one shard "
            "would be seen by the ranks that hold it alone. Train in bfloat16, which needs no scaler."
        )


def _before_a_step(optimizer: Optimizer, args: object, keywords: object) -> None:
    """Of any optimizer. Before its first: one that exchanges its own codes needs gradients of its own."""
    for module, buckets in _voting.items():
        buckets.voted = False
        if isinstance(buckets, ShardedBuckets) and buckets.votes.workers > 1 and (name := buckets.left_out(module)):
            raise RuntimeError(
                f"{name} has a gradient that nobody has voted on, and the replicas would come apart: it was not "
                "trained, or not there, when vote_gradients was called. Call it when weights are loaded, and "
                "all is unfrozen that will be trained; what is to be trained later can be frozen again after it."
            )
    if optimizer in _checked:
        return
    _checked.add(optimizer)
    if not members_of(optimizer):
        return
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module, buckets in _voting.items():
        if buckets.votes.workers > 1 and any(id(p) in own for p in module.parameters()):
            raise RuntimeError(
                f"{type(optimizer).__name__} exchanges votes or codes of gradients itself, and vote_gradients has made "
                "these the same on all workers. Take one of the two: keep_gradients_local with an optimizer of "
                "hf_dlion, or vote_gradients with one that steps alone, such as torch.optim.AdamW."
            )


register_optimizer_step_pre_hook(_before_a_step)
