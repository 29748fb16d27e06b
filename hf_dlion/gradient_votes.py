"""Votes as a communication hook of DDP: what reaches the optimizer is what the workers' signs decide.

DDP calls the hook with each bucket as its gradients become ready, in one order on all ranks. The hook starts the
bucket's conversation and takes the earlier ones to their next wait; the last bucket's hook ends them all. So one bucket
is on its way while backward computes the next.
"""

# No `from __future__ import annotations`: DDP reads those of the hook, and they must be classes.
import logging
import weakref
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .local_gradients import check_hook_is_free, refuse_join, taken_over, voting_group
from .optim.signed_gradients import SignedGradients, check_options
from .optim.workers import members_of
from .wire.conversation import Conversation, one_turn

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
    target: Accelerator | DistributedDataParallel,
    aggregation: str = "avg",
    *,
    dither: bool = True,
    exchange: str = "auto",
    on_bad_gradient: str = "abstain",
    scaler: torch.amp.GradScaler | None = None,
) -> SignedGradients | None:
    """Let the workers vote on the gradients, in place of averaging them: one bit a parameter, for any optimizer.

    Call it with the ``Accelerator`` before ``accelerator.prepare(model)``, or with a DDP module before its first
    backward. After backward, the gradients of all workers are what they decided, from -1 to 1
    (:class:`hf_dlion.optim.signed_gradients.SignedGradients`): for optimizers that are free of scale. Their norm grows
    with the root of the number of parameters, so clipping at 1 makes all steps equally large.
    With gradient accumulation, the votes are on the sum of a step (``accelerator.accumulate``, or DDP's ``no_sync``).

    Args:
        target: the accelerator that will wrap the model, or the wrapped model.
        aggregation: ``"avg"``, the mean of the signs, or ``"mavo"``, their majority.
        dither: whether noise is added before the sign is taken, so that the votes say how large a gradient is.
        exchange: how votes travel, as of :class:`hf_dlion.DistributedLion`.
        on_bad_gradient: ``"abstain"``, a worker has no vote on a bucket in which its gradient has a NaN or Inf;
            ``"raise"``, all ranks raise.
        scaler: a gradient scaler, if there is one; it gets to see a bad gradient on all ranks, and
            ``on_bad_gradient`` is not asked. An accelerator has its own.

    Returns:
        Of a DDP module, this worker's part, with the ``ledger`` and the ``step``, which a loop that resumes may set. Of
        an accelerator, None: its ``ddp_handler.votes`` has one for each model that it has wrapped.

    Raises:
        ValueError: gradients are reduced by other means than DDP, or by a hook already; the accelerator has prepared a
            model, or sees one process where several were launched; an option is not known.
    """
    check_options(aggregation, exchange, on_bad_gradient)
    options: dict[str, Any] = {"aggregation": aggregation, "dither": dither, "exchange": exchange}
    options |= {"on_bad_gradient": on_bad_gradient, "scaler": scaler}
    if isinstance(target, DistributedDataParallel):
        return _vote_on(target, options)
    if not isinstance(target, Accelerator):
        raise TypeError(
            f"vote_gradients takes an accelerate.Accelerator or a DistributedDataParallel module, and was given a "
            f"{type(target).__name__}."
        )
    if target.num_processes == 1:
        logger.warning("vote_gradients in one process: nobody votes, and gradients stay as they are.")
    _prepare_votes(target, options)
    return None


def _prepare_votes(accelerator: Accelerator, options: dict[str, Any]) -> None:
    handler = taken_over(accelerator, "vote_gradients", VotedGradients)
    if voting_group(accelerator) is not None:
        raise ValueError(
            "vote_gradients was given an Accelerator that shards replicas by FSDP2, whose gradients it cannot vote on "
            'yet. Leave sharding out, or take a method that votes between replicas: optim="dmuon_mavo" or '
            "DistributedMuon."
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


class _Buckets:
    """The conversations of a module's buckets.

    Args:
        votes: this worker's part.
        parameters: on which it votes.
    """

    def __init__(self, votes: SignedGradients, parameters: Sequence[Tensor]) -> None:
        self.votes = votes
        self.index = {id(parameter): index for index, parameter in enumerate(parameters)}
        self.running: list[Conversation[None]] = []
        self.voted = False  # since an optimizer's last step
        self._warned = False

    def add(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Start the conversation of a bucket; after the last one, all have ended."""
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of layout {buffer.layout}: votes are on every element. Use dense gradients, as "
                "nn.Embedding(sparse=False) gives."
            )
        if self.voted and not self._warned and self.votes.scaler is None:  # which leaves steps out
            self._warned = True
            logger.warning(
                "the workers vote on gradients a second time, and no optimizer has stepped. If the gradients were not "
                "cleared, these are votes on a decision and a gradient. Put all backward passes of a step but the last "
                "under no_sync()."
            )
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=None if buffer.device.type == "cpu" else [buffer.device]
        )
        running = [self._conversation(bucket, buffer, future), *self.running]
        self.running = []  # should one of them raise
        running = one_turn(running)
        while bucket.is_last() and running:
            running = one_turn(running)
        self.running = running
        if bucket.is_last():
            self.votes.end_step()
            self.voted = True
        return future

    def _conversation(self, bucket: Any, buffer: Tensor, future: torch.futures.Future[Tensor]) -> Conversation[None]:
        parts = [(self.index[id(parameter)], parameter.numel()) for parameter in bucket.parameters()]
        yield from self.votes.vote(buffer, parts)
        future.set_result(buffer)


@torch.no_grad()
def _vote(state: _Buckets, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """The hook."""
    return state.add(bucket)


_voting: weakref.WeakKeyDictionary[DistributedDataParallel, _Buckets] = weakref.WeakKeyDictionary()
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
    buckets = _voting[module] = _Buckets(votes, parameters)
    module.register_comm_hook(buckets, _vote)
    module.register_forward_pre_hook(refuse_join)
    return votes


def _before_a_step(optimizer: Optimizer, args: object, keywords: object) -> None:
    """Of any optimizer. Before its first: one that exchanges its own codes needs gradients of its own."""
    for buckets in _voting.values():
        buckets.voted = False
    if optimizer in _checked:
        return
    _checked.add(optimizer)
    if not members_of(optimizer):
        return
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for module in _voting:
        if dist.get_world_size(module.process_group) > 1 and any(id(p) in own for p in module.parameters()):
            raise RuntimeError(
                f"{type(optimizer).__name__} exchanges votes or codes of gradients itself, and vote_gradients has made "
                "these the same on all workers. Take one of the two: keep_gradients_local with an optimizer of "
                "hf_dlion, or vote_gradients with one that steps alone, such as torch.optim.AdamW."
            )


register_optimizer_step_pre_hook(_before_a_step)
