"""Conversations of the workers about gradients, bucket by bucket, as these come in a backward.

DDP calls its hook with each bucket as its gradients become ready, in one order on all ranks. The hook starts the
bucket's conversation and takes the earlier ones to their next wait; the last bucket's hook ends them all. So one bucket
is on its way while backward computes the next.

FSDP2 averages a gradient inside a replica, and calls the hooks of its parameter then. Replicas need not reach the same
parameters, nor in one order, so buckets are laid out beforehand, from the last parameter to the first, as backward
goes; each starts when the ones before it have, and its gradients are there, and the rest when backward ends.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from .bits.streams import follow, mark, stream_beside
from .optim.signed_gradients import SignedGradients, Unheard, in_buckets
from .optim.tensors import device_of_backward, local, placed_as
from .wire.conversation import Conversation, one_turn

logger = logging.getLogger(__name__)


class Conversations:
    """Those of a module's buckets.

    Args:
        votes: this worker's part.
        asks_first: whether it is asked who votes on a bucket before it is decided; else all count at first.
    """

    def __init__(self, votes: SignedGradients, *, asks_first: bool = True) -> None:
        self.votes = votes
        self.asks_first = asks_first
        self.voted = False  # since an optimizer's last step
        self._warned = False
        self.begin()

    def begin(self) -> None:
        """A step; a backward that raised leaves nothing to it."""
        self.running: list[Conversation[Any]] = []
        self.unheard = None if self.asks_first else Unheard()

    def start(self, conversation: Conversation[Any]) -> None:
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
        running, unheard = self.running, self.unheard
        self.begin()
        while running:
            running = one_turn(running)
        self.votes.end_step(unheard)
        self.voted = True


class Buckets(Conversations):
    """Of DDP.

    Args:
        votes: this worker's part.
        parameters: on which it votes.
    """

    def __init__(self, votes: SignedGradients, parameters: Sequence[Tensor]) -> None:
        device = parameters[0].device
        # To ask, the host would wait for a GPU at each bucket, and backward for the host. With a scaler all count.
        super().__init__(votes, asks_first=device.type == "cpu" or votes.scaler is not None)
        self.index = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._beside = stream_beside(device)  # where backward does not wait for the network

    def begin(self) -> None:
        """As the parent."""
        super().begin()
        self._promised: list[tuple[torch.futures.Future[Tensor], Tensor]] = []

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
        if bucket.index() == 0:  # they come in order
            self.begin()
        self._promised.append((future, buffer))
        parts = [(self.index[id(parameter)], parameter.numel()) for parameter in bucket.parameters()]
        there = mark(buffer.device)
        with self._beside:
            follow(there, buffer)
            self.start(self.votes.vote(buffer, parts, (), self.unheard))
            if bucket.is_last():
                promised = self._promised
                self.end()
                for ready, decided in promised:
                    ready.set_result(decided)
        return future


class ShardedBuckets(Conversations):
    """Of a module that FSDP2 shards.

    Args:
        votes: this worker's part.
        parameters: on which it votes; held weakly, since their hooks lead here.
    """

    def __init__(self, votes: SignedGradients, parameters: Sequence[Tensor]) -> None:
        super().__init__(votes)
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        held = [local(parameter) for parameter in parameters]
        from_the_last = [index for index in reversed(range(len(held))) if held[index].nbytes]
        self._buckets = list(in_buckets(from_the_last, held))
        self._arrived: set[int] = set()
        self._started = 0
        self._in_backward = False
        self._error: Exception | None = None

    def before_forward(self, module: nn.Module, inputs: object) -> None:
        """A hook of the module."""
        self.begin()
        self._arrived, self._started, self._in_backward = set(), 0, False
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
