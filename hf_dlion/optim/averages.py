"""Averaged gradients: how parameters are stepped by them, and those that AdamW steps beside votes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..bits.rounding import round_at_random, rounding_seed
from ..wire.collectives import Channel
from ..wire.conversation import Conversation
from ..wire.sums import sum_dense
from .agreement import StepInputs
from .layout import Span, batches, cut
from .rules import RULES
from .views import Views

StepByRule = Callable[
    [dict[str, Any], Sequence[Span], Sequence[Tensor], Sequence[Tensor], Sequence[dict[str, Tensor]]], None
]
"""Changes float32 parameters of a param group by their mean gradients and states; all of them flat, one a span."""

BUCKET = 1 << 19
"""Elements a bucket, at most, where parameters can be cut. Bounds the memory of a step."""

ADAMW_STATES = RULES["adamw"].state_names
"""Of a parameter that is averaged; the same on all workers."""


class Averages:
    """Parameters whose gradients are averaged while others are voted on; AdamW steps them.

    Args:
        views: of the parameters and their states.
        sizes: by parameter, how many elements of it are averaged here; 0 of those that are voted on.
        group_of: the index of each parameter's group.
    """

    def __init__(self, views: Views, sizes: Sequence[int], group_of: Sequence[int]) -> None:
        self._views = views
        self._buckets = list(batches(cut(sizes, BUCKET), BUCKET))
        self._group_of = group_of

    def conversations(
        self, channel: Channel, inputs: StepInputs, voting: Sequence[int], absent: Container[int]
    ) -> Iterator[Conversation[None]]:
        """Average and step, bucket by bucket.

        Args:
            channel: the workers.
            inputs: of the step.
            voting: the ranks that count.
            absent: indices of the parameters that are left alone.
        """
        for spans in self._present(absent) if voting else ():
            yield self._average(channel, inputs, voting, spans)

    def step_alone(self, inputs: StepInputs, absent: Container[int]) -> None:
        """The step of one worker alone; arguments as of :meth:`conversations`."""
        for spans in self._present(absent):
            self._step(inputs, spans, torch.cat(gradients_in(self._views, spans, inputs.gradients)))

    def _present(self, absent: Container[int]) -> Iterator[list[Span]]:
        for bucket in self._buckets:
            if spans := [span for span in bucket if span.parameter not in absent]:
                yield spans

    def _average(
        self, channel: Channel, inputs: StepInputs, voting: Sequence[int], spans: Sequence[Span]
    ) -> Conversation[None]:
        own = torch.cat(gradients_in(self._views, spans, inputs.gradients))
        total = yield from sum_dense(channel, own, voting)
        self._step(inputs, spans, total.div_(len(voting)))

    def _step(self, inputs: StepInputs, spans: Sequence[Span], mean: Tensor) -> None:
        groups = [inputs.replica.groups[self._group_of[span.parameter]] for span in spans]
        adamw = RULES["adamw"].apply
        step_by_means(
            self._views, spans, groups, mean, lambda group, _, x, means, states: adamw(x, means, states, group)
        )


def states_in(views: Views, spans: Sequence[Span]) -> list[dict[str, Tensor]]:
    """Of each span, by name."""
    return [{name: span.of(state) for name, state in views.states[span.parameter].items()} for span in spans]


def gradients_in(views: Views, spans: Sequence[Span], gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """Of each span, float32; zeros where there is none."""
    found = []
    for span in spans:
        gradient, device = gradients[span.parameter], views.parameters[span.parameter].device
        if gradient is None:
            found.append(torch.zeros(span.length, dtype=torch.float32, device=device))
        else:
            found.append(span.of(gradient).float())
    return found


def step_by_means(
    views: Views, spans: Sequence[Span], groups: Sequence[dict[str, Any]], mean: Tensor, rule: StepByRule
) -> None:
    """Step parameters by a rule, those of a param group at once.

    Args:
        views: of the parameters and their states.
        spans: what is stepped.
        groups: of each span, its param group.
        mean: of the gradients, float32, flat, the spans one after the other.
        rule: changes float32 parameters.
    """
    means = mean.split([span.length for span in spans])
    together = zip(spans, groups, means, states_in(views, spans), strict=True)
    for _, members in itertools.groupby(together, lambda one: id(one[1])):
        spans_of, (group, *_), means_of, states_of = zip(*members, strict=True)
        parts = [span.of(views.parameters[span.parameter]) for span in spans_of]
        wide = [part if part.dtype == torch.float32 else part.float() for part in parts]
        rule(group, spans_of, wide, means_of, states_of)
        for span, part, updated in zip(spans_of, parts, wide, strict=True):
            _write_back(span, part, updated, group["step"])


def _write_back(span: Span, part: Tensor, updated: Tensor, step: int) -> None:
    if part.dtype == torch.bfloat16:
        elements = torch.arange(span.start, span.start + span.length, dtype=torch.int32, device=part.device)
        updated = round_at_random(updated, elements, rounding_seed(step, span.parameter, 0, part.device))
    if updated is not part:
        part.copy_(updated)
