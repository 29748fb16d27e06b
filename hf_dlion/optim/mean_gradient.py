"""Methods whose workers send codes of their gradients, whose mean drives a common rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from ..wire.collectives import Channel
from ..wire.conversation import Conversation
from ..wire.shards import Shards
from ..wire.sums import sum_dense
from .agreement import StepInputs
from .averages import BUCKET, gradients_in, states_in, step_by_means
from .layout import Span, batches, cut
from .rules import RULES
from .sharding import find_shards, shard_sizes
from .states import all_parameters
from .tensors import local
from .views import Views
from .workers import (
    Plan,
    WorkersOptimizer,
    WorkersOptions,
    check_betas,
    check_known,
    check_range,
)


class RuleOptions(WorkersOptions, total=False):
    """Keyword arguments of methods that step by a rule; see :class:`MeanGradient`."""

    rule: str
    betas: tuple[float, float]
    eps: float


@dataclass(kw_only=True)
class MeanPlan(Plan):
    """What stays the same from step to step.

    Attributes:
        buckets: the spans of each.
        group_of: the index of each parameter's group.
    """

    buckets: Sequence[Sequence[Span]]
    group_of: Sequence[int]


@dataclass(frozen=True)
class Share:
    """What this worker has of a bucket, in one step.

    Attributes:
        spans: what is in it.
        gradients: of each span, float32; zeros where there is none.
        states: of each span, by name; copies where this worker abstains.
        step: the number of the step.
        shared: what :meth:`CodedMean._prepare` gave.
    """

    spans: Sequence[Span]
    gradients: list[Tensor]
    states: list[dict[str, Tensor]]
    step: int
    shared: Any


class CodedMean(WorkersOptimizer):
    """Every worker sends what it has for each parameter in some code; what they come to on average updates them.

    Buckets are exchanged one after the other, side by side. A parameter for which a worker has nothing counts as zeros
    there; one for which no worker has anything is left alone.
    """

    whole_parameters = False
    """Whether a parameter's code needs all of it, so that a bucket is one parameter at least."""

    by_element = False
    """Whether an element's code depends on no other, so that parameters can be sharded."""

    def _prepare(self, channel: Channel | None, voters: Sequence[int], inputs: StepInputs) -> Any:
        """What the codes of all buckets need; may be a collective.

        Args:
            channel: the workers; None for one alone.
            voters: the ranks that count.
            inputs: of the step.
        """
        return None

    @abstractmethod
    def _mean(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        """What the workers' codes come to on average; changes what this worker keeps.

        Args:
            channel: the workers; None for one alone.
            voters: the ranks that count.
            share: this worker's of a bucket.

        Returns:
            float32, flat, the spans one after the other.
        """

    @abstractmethod
    def _step_by_rule(
        self,
        group: dict[str, Any],
        spans: Sequence[Span],
        parameters: Sequence[Tensor],
        means: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> None:
        """Change float32 parameters by these means; all of them flat, one a span."""

    @override
    def _make_plan(self, channel: Channel | None) -> MeanPlan:
        shards = find_shards(all_parameters(self), self.process_group)
        if shards is not None and not self.by_element:
            raise ValueError(
                f"{type(self).__name__} with sharded parameters: its messages are made from whole parameters. Methods "
                "for replicas sharded by FSDP2 are dlion, dsignum, dmuon, glion, gadamw and gmuon."
            )
        return MeanPlan(
            workers=channel.size if channel else 1,
            channel=channel,
            views=Views(),
            shards=shards,
            buckets=self._lay_out(shards),
            group_of=[index for index, group in enumerate(self.param_groups) for _ in group["params"]],
        )

    def _lay_out(self, shards: Shards | None) -> list[list[Span]]:
        """Buckets; those of whole parameters have the same ones on all shards, of which some may hold nothing."""
        parameters = all_parameters(self)
        sizes = [local(parameter).numel() for parameter in parameters]
        if shards is None or not self.whole_parameters:
            return list(batches(cut(sizes, None if self.whole_parameters else BUCKET), BUCKET))
        most = [shard_sizes(parameter.shape, shards.size)[0] for parameter in parameters]
        together = batches(cut(most, None), BUCKET)
        return [[Span(span.parameter, 0, sizes[span.parameter]) for span in bucket] for bucket in together]

    @override
    def _conversations(self, plan: MeanPlan, inputs: StepInputs) -> Iterator[Conversation[None]]:
        voters = self._voters(plan.channel, inputs)
        if not voters:
            return
        shared = self._prepare(plan.channel, voters, inputs)
        for bucket in plan.buckets:
            if spans := [span for span in bucket if span.parameter not in self.agreement.absent]:
                yield self._average(plan, voters, spans, inputs, shared)

    def _voters(self, channel: Channel | None, inputs: StepInputs) -> Sequence[int]:
        if channel is None:
            return [0] if inputs.bad_gradient < 0 else []
        headers, work = channel.all_gather(self.agreement.header(inputs))
        work.wait()
        return self.agreement.voters(channel, inputs.replica, headers)

    def _average(
        self, plan: MeanPlan, voters: Sequence[int], spans: Sequence[Span], inputs: StepInputs, shared: Any
    ) -> Conversation[None]:
        """One bucket's way through a step."""
        states = states_in(plan.views, spans)
        gradients = gradients_in(plan.views, spans, inputs.gradients)
        abstains = inputs.bad_gradient >= 0  # it takes part in the rounds, uncounted, and keeps what is its own
        kept = [{name: tensor.clone() for name, tensor in state.items()} for state in states] if abstains else states
        mean = yield from self._mean(plan.channel, voters, Share(spans, gradients, kept, inputs.step, shared))
        del gradients, kept
        groups = [self.param_groups[plan.group_of[span.parameter]] for span in spans]
        step_by_means(plan.views, spans, groups, mean, self._step_by_rule)


class MeanGradient(CodedMean):
    """Every worker sends its gradient in some code; the mean of what arrives is the gradient of a rule.

    A parameter without a gradient on a worker counts as a gradient of zero; without one on all, it is left alone. As
    with :class:`DistributedLion`, gradients must be each worker's own, and parameters are the same on all workers, bit
    for bit, after every step.

    Args:
        params: parameters, named parameters or param groups; dense, real floating point, on one device.
        lr: learning rate.
        weight_decay: as the rule has it.
        rule: ``"sgd"``, ``"adamw"`` or ``"lion"``.
        momentum: of ``"sgd"``.
        betas: of ``"adamw"`` and ``"lion"``.
        eps: of ``"adamw"``.
        local_state: keys of what a worker keeps for itself.
        process_group, on_bad_gradient, check_replicas_steps: as in :class:`WorkersOptimizer`.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        rule: str = "sgd",
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        local_state: tuple[str, ...] = (),
        **options: Unpack[WorkersOptions],
    ) -> None:
        check_known("rule", rule, tuple(RULES))
        self.rule = rule
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, defaults, RULES[rule].state_names, local_state, **options)

    @abstractmethod
    def _sum(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        """What the workers' codes of their gradients sum to; changes what this worker keeps.

        Args:
            channel: the workers; None for one alone.
            voters: the ranks that count.
            share: this worker's of a bucket.

        Returns:
            float32, flat, the spans one after the other.
        """

    @override
    def _mean(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        total = yield from self._sum(channel, voters, share)
        return total.div_(len(voters))

    @override
    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_betas(group["betas"])
        check_range("momentum", group["momentum"], "it is a decay, at least 0 and less than 1.", below=1)
        check_range("eps", group["eps"], "it cannot be negative.")

    @override
    def options(self) -> dict[str, Any]:
        return super().options() | {"rule": self.rule}

    @override
    def hyperparameters(self) -> tuple[str, ...]:
        return ("lr", "weight_decay", *RULES[self.rule].hyperparameters)

    @override
    def _step_by_rule(
        self,
        group: dict[str, Any],
        spans: Sequence[Span],
        parameters: Sequence[Tensor],
        means: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> None:
        RULES[self.rule].apply(parameters, means, states, group)


class DenseMean(MeanGradient):
    """The gradients themselves are averaged: 32 bits a parameter up, and 32 down."""

    by_element = True

    @override
    def _sum(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        flat = torch.cat(share.gradients)
        if channel is None:
            return flat
        return (yield from sum_dense(channel, flat, voters))
