"""Votes as a communication hook: what reaches the optimizer is what the workers' signs decide.

DDP calls the hook with each bucket as its gradients become ready, in one order on all ranks. The hook starts the
bucket's conversation and takes the earlier ones to their next wait; the last bucket's hook ends them all. So one bucket
is on its way while backward computes the next.

FSDP2 averages a gradient inside a replica, and calls the hooks of its parameter then. Replicas need not reach the same
parameters, nor in one order, so buckets are laid out beforehand, from the last parameter to the first, as backward
goes; each starts when the ones before it have, and its gradients are there, and the rest when backward ends.
"""

# No `from __future__ import annotations`: DDP reads those of the hook, and they must be classes.
import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from .local_gradients import check_hook_is_free, refuse_join, separated, taken_over, voted_on, voting_group
from .optim.signed_gradients import SignedGradients, check_options
from .optim.tensors import device_of_backward, local, placed_as, shard_group
from .optim.workers import members_of
from .wire.collectives import ProcessChannel
from .wire.conversation import Conversation, one_turn
from .wire.groups import rank_in
from .wire.ledger import Ledger

logger = logging.getLogger(__name__)

_BUCKET = 25 << 20
"""Bytes of the gradients of a sharded module that are voted on together, as DDP's."""


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


class _Conversations:
    """Those of a module's buckets.

    Args:
        votes: this worker's part.
    """

    def __init__(self, votes: SignedGradients) -> None:
        self.votes = votes
        self.running: list[Conversation[None]] = []
        self.voted = False  # since an optimizer's last step
        self._warned = False

    def start(self, conversation: Conversation[None]) -> None:
        """Take it, and then those before it, to their next wait."""
        if self.voted and not self._warned and self.votes.scaler is None:  # which leaves steps out
            self._warned = True
            logger.warning(
                "the workers vote on gradients a second time, and no optimizer has stepped. If the gradients were not "
                "cleared, these are votes on a decision and a gradient. Put all backward passes of a step but the last "
                "under no_sync(), or after set_requires_gradient_sync(False) where FSDP2 shards."
            )
        running = [conversation, *self.running]
        self.running = []  # should one of them raise
        self.running = one_turn(running)

    def end(self) -> None:
        """All conversations of a step, which have been started."""
        running = self.running
        self.running = []
        while running:
            running = one_turn(running)
        self.votes.end_step()
        self.voted = True


class _Buckets(_Conversations):
    """Of DDP.

    Args:
        votes: this worker's part.
        parameters: on which it votes.
    """

    def __init__(self, votes: SignedGradients, parameters: Sequence[Tensor]) -> None:
        super().__init__(votes)
        self.index = {id(parameter): index for index, parameter in enumerate(parameters)}

    def add(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Start the conversation of a bucket; after the last one, all have ended."""
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of layout {buffer.layout}: votes are on every element. Use dense gradients, as "
                "nn.Embedding(sparse=False) gives."
            )
        future: torch.futures.Future[Tensor] = torch.futures.Future(
            devices=None if buffer.device.type == "cpu" else [buffer.device]
        )
        self.start(self._conversation(bucket, buffer, future))
        if bucket.is_last():
            self.end()
        return future

    def _conversation(self, bucket: Any, buffer: Tensor, future: torch.futures.Future[Tensor]) -> Conversation[None]:
        parts = [(self.index[id(parameter)], parameter.numel()) for parameter in bucket.parameters()]
        yield from self.votes.vote(buffer, parts)
        future.set_result(buffer)


class _Shards(_Conversations):
    """Of a module that FSDP2 shards.

    Args:
        votes: this worker's part.
        parameters: on which it votes; held weakly, since their hooks lead here.
    """

    def __init__(self, votes: SignedGradients, parameters: Sequence[Tensor]) -> None:
        super().__init__(votes)
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._buckets = list(_from_the_last(parameters))
        self._arrived: set[int] = set()
        self._started = 0
        self._in_backward = False
        self._error: Exception | None = None

    def before_forward(self, module: nn.Module, inputs: object) -> None:
        """A backward that raised has left nothing behind."""
        self._arrived, self._started, self._in_backward, self.running = set(), 0, False, []
        self._error = None

    def after_forward(self, module: nn.Module, inputs: object, outputs: object) -> None:
        """What begins at the outputs is the whole backward; checkpointed layers can have others inside of it."""
        for tensor in _tensors_in(outputs):
            if tensor.requires_grad:
                tensor.register_hook(self._begin_backward)

    def arrive(self, index: int, parameter: Tensor) -> None:
        """The gradient of a parameter is there, averaged over the replica."""
        self._begin_backward()  # of one that does not begin at the module's outputs
        self._arrived.add(index)
        if device_of_backward(parameter) != "cpu":
            return  # these hooks run on a stream of FSDP2
        while self._started < len(self._buckets) and self._arrived.issuperset(self._buckets[self._started]):
            self._start_next()

    def left_out(self, module: nn.Module) -> str | None:
        """The name of a parameter of the module with a gradient that nobody has voted on, if there is one."""
        known = {id(reference()) for reference in self._parameters}
        return next((n for n, p in module.named_parameters() if p.grad is not None and id(p) not in known), None)

    def _begin_backward(self, gradient: Tensor | None = None) -> None:
        if not self._in_backward:
            self._in_backward = True
            Variable._execution_engine.queue_callback(self._queue_end)

    def _queue_end(self) -> None:
        """After what FSDP2 has queued since: the gradients of modules around others come there."""
        Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._in_backward = False
        if not self._arrived:  # the gradients of a micro-batch that is not the last
            return
        while self._started < len(self._buckets):
            self._start_next()
        self._arrived, self._started = set(), 0
        if self._error is not None:
            self.running = []
            raise self._error
        self.end()

    def _start_next(self) -> None:
        """What goes wrong is raised when backward has ended, for it would leave FSDP2's modules halfway."""
        bucket = self._buckets[self._started]
        self._started += 1
        if self._error is None:
            try:
                self.start(self._conversation(bucket))
            except Exception as error:
                self._error = error

    @torch.no_grad()
    def _conversation(self, bucket: Sequence[int]) -> Conversation[None]:
        parameters = [parameter for index in bucket if (parameter := self._parameters[index]()) is not None]
        given = [torch.zeros_like(local(p)) if p.grad is None else local(p.grad) for p in parameters]
        sizes, absent = [own.numel() for own in given], [i for i, p in enumerate(parameters) if p.grad is None]
        flat = torch.cat([own.flatten() for own in given])
        present = yield from self.votes.vote(flat, list(zip(bucket, sizes, strict=True)), absent)
        for place, decided in enumerate(flat.split(sizes)):
            given[place].copy_(decided.view_as(given[place]))
            if place in absent and present[place]:
                parameters[place].grad = placed_as(parameters[place], given[place])


def _tensors_in(outputs: object) -> Iterator[Tensor]:
    """Those of a tensor, or of mappings, sequences and dataclasses of them."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping | list | tuple):
        for output in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors_in(output)
    elif is_dataclass(outputs):
        yield from _tensors_in([getattr(outputs, field.name) for field in fields(outputs)])


def _from_the_last(parameters: Sequence[Tensor]) -> Iterator[list[int]]:
    """Buckets of parameters of one dtype, of which this rank holds something."""
    bucket: list[int] = []
    size = 0
    for index in reversed(range(len(parameters))):
        own = local(parameters[index])
        if not own.nbytes:
            continue
        if bucket and (size + own.nbytes > _BUCKET or own.dtype != parameters[bucket[0]].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(index)
        size += own.nbytes
    if bucket:
        yield bucket


@torch.no_grad()
def _vote(state: _Buckets, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]
    """The hook."""
    return state.add(bucket)


_voting: weakref.WeakKeyDictionary[nn.Module, _Conversations] = weakref.WeakKeyDictionary()
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


def _vote_on_shards(module: nn.Module, group: dist.ProcessGroup | None, options: dict[str, Any]) -> SignedGradients:
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    parameters = [parameter for _, parameter in trained]
    _check_shards(module, parameters, group, options["scaler"])
    names, held = [name for name, _ in trained], [local(parameter) for parameter in parameters]
    shards = shard_group(parameters)
    votes = SignedGradients(held, names, _of_its_own(group), shard=rank_in(shards), **options)
    buckets = _voting[module] = _Shards(votes, parameters)
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
    if module in _voting or not parameters:
        raise ValueError(
            "vote_gradients was called for this module before. Call it once, when all that will be trained can be."
            if parameters
            else "vote_gradients was given a module in which nothing is trained. Call it when all is that will be."
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
        if isinstance(buckets, _Shards) and buckets.votes.workers > 1 and (name := buckets.left_out(module)):
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
