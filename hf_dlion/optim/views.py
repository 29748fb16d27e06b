"""Flat views of parameters and of their states, in memory order; and as the layout cuts them into segments."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..bits.counting import popcount
from ..bits.kernels import EAGER, Kernels, apply_signs
from ..bits.packing import BLOCK, LANES, unpack_bits
from ..bits.rounding import rounding_seed
from ..wire.exchange import Decision
from .layout import Bucket, Segment, Span
from .tensors import Order, flatten, memory_order

State = Mapping[str, Tensor]


class Views:
    """Parameters and their states, flat, for as long as their memory is the same.

    Attributes:
        parameters: one flat view a parameter.
        states: for each parameter a flat view of each of its states, by name.
    """

    def __init__(self) -> None:
        self.parameters: list[Tensor] = []
        self.states: list[dict[str, Tensor]] = []
        self._orders: list[Order] = []
        self._places: list[Any] = []

    def follow(self, parameters: Sequence[Tensor], states: Sequence[State]) -> None:
        """Be views of these; made anew if ``parameter.data`` or a state was replaced, or is laid out otherwise."""
        places: list[Any] = [(tensor.data_ptr(), tensor.stride()) for tensor in parameters]
        places += [tensor.data_ptr() for state in states for tensor in state.values()]
        if places == self._places:
            return
        self._orders = [memory_order(parameter) for parameter in parameters]
        self.parameters = self.flatten(parameters)  # type: ignore[assignment]
        self.states = [
            {name: flatten(tensor, order) for name, tensor in state.items()}
            for state, order in zip(states, self._orders, strict=True)
        ]
        self._places = places

    def flatten(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """A tensor for each parameter, or None, in the memory order of its parameter."""
        return [None if t is None else flatten(t, order) for t, order in zip(tensors, self._orders, strict=True)]

    def flat(self, index: int, tensor: Tensor) -> Tensor:
        """As that, for one parameter."""
        return flatten(tensor, self._orders[index])


@dataclass(frozen=True)
class _Given:
    """What a vote reads of a segment, ``[B, 32, 32]``: gradient or direction, and states."""

    segment: Segment
    tensor: Tensor
    states: Sequence[Tensor]


class SegmentViews(Views):
    """Views that are cut into segments, and what kernels do to them.

    Args:
        buckets: the layout.
        state_names: for each param group the states that a vote reads and changes, in the order in which its kernel
            takes them. None: its direction is given in place of a gradient.
        device: of the parameters.
        group_of: the number of each parameter's group.
        kernels: which implementation of the passes.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        state_names: Sequence[Sequence[str]],
        device: torch.device,
        group_of: Sequence[int],
        kernels: Kernels = EAGER,
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.buckets = buckets
        self.device = device
        self._group_of = group_of
        self._state_names = state_names
        self._no_seed = torch.zeros(1, dtype=torch.int32, device=device)
        self._parameter_cuts: dict[int, list[Tensor]] = {}
        self._state_cuts: dict[int, list[list[Tensor]]] = {}

    def follow(self, parameters: Sequence[Tensor], states: Sequence[State]) -> None:
        """As the parent."""
        before = self.parameters
        super().follow(parameters, states)
        if self.parameters is before:
            return
        for segment in (segment for bucket in self.buckets for segment in bucket.segments):
            self._parameter_cuts[id(segment)] = _cut(self.parameters, segment)
            self._state_cuts[id(segment)] = [
                _cut({span.parameter: self.states[span.parameter][name] for span in segment.spans}, segment)
                for name in self._state_names[segment.group]
            ]

    def given(self, gradients: Sequence[Tensor | None], verdict: Tensor | None) -> Sequence[Tensor | None]:
        """Gradients or directions of all parameters, flat, as :meth:`pack` takes them; None where there is none.

        Args:
            gradients: those.
            verdict: as of ``StepInputs``; states stay as they are, if it is of a bad gradient.
        """
        return gradients

    def pack(
        self,
        bucket: Bucket,
        given: Sequence[Tensor | None],
        hypers: Tensor,
        zero_votes: Tensor,
        *,
        keep_states: bool = False,
    ) -> Tensor:
        """Own votes on a bucket, int32 ``[W]``; updates the states that the vote has.

        Args:
            bucket: of the layout.
            given: by :meth:`given`; None votes zero and leaves the states.
            hypers: for each param group, as the kernels take it.
            zero_votes: bool ``[32]``, what an exact zero votes, by lane.
            keep_states: leave the states as they are; :meth:`move` updates them later.
        """
        words = torch.empty((bucket.blocks, LANES), dtype=torch.int32, device=self.device)
        together: dict[tuple[bool, torch.dtype], list[_Given]] = {}
        for segment in bucket.segments:
            if segment.staged:
                self._vote_staged(segment, given, hypers, zero_votes, words, keep_states)
                continue
            [span] = segment.spans
            gradient = given[span.parameter]
            if gradient is None:
                words[segment.rows] = -zero_votes.to(torch.int32)
            else:
                states = [cuts[0] for cuts in self._state_cuts[id(segment)]]
                part = _Given(segment, _blocks(gradient, span), states)
                together.setdefault((bool(states), gradient.dtype), []).append(part)
        for parts in together.values():
            self._vote(parts, hypers, zero_votes, words, keep_states)
        return words.view(-1)

    def move(self, gradients: Sequence[Tensor | None], hypers: Tensor, state_name: str) -> None:
        """Update the momentum of all parameters that have one, and a gradient, as the vote would.

        Args:
            gradients: of all parameters, flat.
            hypers: for each param group, as the kernels take it.
            state_name: of the momentum.
        """
        for state, gradient, group in zip(self.states, gradients, self._group_of, strict=True):
            if gradient is not None and state_name in state:
                self._move(gradient, state[state_name], hypers[group])

    def apply(
        self,
        bucket: Bucket,
        decision: Decision,
        hypers: Tensor,
        step: int,
        absent: Container[int],
        scales: Sequence[Tensor] | None = None,
    ) -> None:
        """Update the parameters of a bucket.

        Args:
            bucket: of the layout.
            decision: on its words.
            hypers: for each param group, as the kernels take it.
            step: rounding depends on it.
            absent: indices of parameters that are left alone.
            scales: for each parameter, float32 ``[1]``, what its decision is multiplied by; None is 1.
        """
        together: dict[torch.dtype, list[tuple[Segment, Tensor]]] = {}
        for segment in bucket.segments:
            parameters = self._parameter_cuts[id(segment)]
            present = [i for i, span in enumerate(segment.spans) if span.parameter not in absent]
            if not present:
                continue
            if not segment.staged:
                together.setdefault(segment.dtype, []).append((segment, parameters[0]))
                continue
            staged = torch.zeros(segment.blocks * BLOCK, dtype=segment.dtype, device=self.device)
            slices = [staged[one] for one in segment.slices]
            _copy(parameters, slices)
            self._apply([(segment, staged.view(-1, LANES, LANES))], decision, hypers, step, scales)
            _copy([slices[i] for i in present], [parameters[i] for i in present])
        for parts in together.values():
            self._apply(parts, decision, hypers, step, scales)

    def squares(self, bucket: Bucket, decision: Decision) -> dict[int, Tensor]:
        """By parameter whose direction is given, the sum of squares of n D = 2c - n in a bucket; exact, int64."""
        found: dict[int, Tensor] = {}
        for segment in bucket.segments:
            if not self._state_names[segment.group]:
                for index, square in _squares(segment, decision):
                    found[index] = found[index] + square if index in found else square
        return found

    def step_alone(
        self,
        indices: Sequence[int],
        gradients: Sequence[Tensor | None],
        hypers: Tensor,
        step: int,
        scale: float = 1.0,
    ) -> None:
        """Lion's whole update of some parameters, without a vote.

        Args:
            indices: of the parameters; each has a gradient.
            gradients: of all parameters, flat.
            hypers: for each param group, as the kernels take it.
            step: rounding depends on it.
            scale: what signs are multiplied by.
        """
        factor = None if scale == 1.0 else torch.full((1,), scale, dtype=torch.float32, device=self.device)
        for index in indices:
            gradient, parameter = gradients[index], self.parameters[index]
            assert gradient is not None
            chosen = self.kernels if len(gradient) >= BLOCK else EAGER
            hyper, seed = hypers[self._group_of[index]], self._seed_of(index, step)
            [momentum] = self.states[index].values()
            chosen.step(parameter, gradient, momentum, hyper, seed, factor)

    def directions(
        self,
        indices: Sequence[int],
        gradients: Sequence[Tensor | None],
        hypers: Tensor,
        state_name: str,
        verdict: Tensor | None,
        *,
        keep: bool,
    ) -> list[Tensor]:
        """The directions of some parameters, each with a gradient, float32 and flat.

        Args:
            indices: of the parameters.
            gradients: of all parameters, flat.
            hypers: for each param group, as the kernels take it.
            state_name: of the momentum.
            verdict: as of :meth:`given`.
            keep: leave the momenta as they are; else they move on.
        """
        found = []
        for index in indices:
            gradient, momentum, hyper = gradients[index], self.states[index][state_name], hypers[self._group_of[index]]
            assert gradient is not None
            found.append((hyper[0] * momentum).add_(hyper[1] * gradient.float()))
            if not keep:
                self._move(gradient, momentum, hyper)
        return found

    def apply_alone(self, index: int, decision: Tensor, hyper: Tensor, step: int, scale: Tensor) -> None:
        """The update of one parameter by a flat decision; arguments as of :meth:`apply`."""
        apply_signs(self.parameters[index], decision, hyper, self._seed_of(index, step), scale)

    def _move(self, gradient: Tensor, momentum: Tensor, hyper: Tensor) -> None:
        (self.kernels if len(gradient) >= BLOCK else EAGER).move(gradient, momentum, hyper)

    def _seed_of(self, index: int, step: int) -> Tensor:
        return self._seed(self.parameters[index].dtype, step, Span(index, 0, len(self.parameters[index])))

    def _vote(
        self, parts: Sequence[_Given], hypers: Tensor, zero_votes: Tensor, words: Tensor, keep_states: bool
    ) -> None:
        """By one call of a kernel; parts have states alike, and one dtype."""
        given, rows = [part.tensor for part in parts], [part.segment.rows for part in parts]
        if not parts[0].states:
            self.kernels.sign(given, zero_votes, words, rows)
            return
        kernel = self.kernels.peek if keep_states else self.kernels.vote
        momenta = [part.states[0] for part in parts]
        kernel(given, momenta, [hypers[part.segment.group] for part in parts], zero_votes, words, rows)

    def _apply(
        self,
        parts: Sequence[tuple[Segment, Tensor]],
        decision: Decision,
        hypers: Tensor,
        step: int,
        scales: Sequence[Tensor] | None,
    ) -> None:
        """Update the blocks of segments of one dtype."""
        segments, blocks = zip(*parts, strict=True)
        self.kernels.apply(
            blocks,
            [hypers[segment.group] for segment in segments],
            [self._seed(segment.dtype, step, segment.spans[0]) for segment in segments],
            [None if scales is None else _scale_of(segment, scales) for segment in segments],
            decision.highest,
            [plane.view(-1, LANES) for plane in decision.planes],
            [segment.rows for segment in segments],
        )

    def _vote_staged(
        self,
        segment: Segment,
        gradients: Sequence[Tensor | None],
        hypers: Tensor,
        zero_votes: Tensor,
        words: Tensor,
        keep_states: bool,
    ) -> None:
        # Zeros where there is no gradient: they vote zero, and the states there are not written back.
        size = segment.blocks * BLOCK
        present = [i for i, span in enumerate(segment.spans) if gradients[span.parameter] is not None]
        slices = [segment.slices[i] for i in present]
        # A direction is float32, and would lose its small entries in float16.
        dtype = segment.dtype if self._state_names[segment.group] else torch.float32
        staged_gradient = torch.zeros(size, dtype=dtype, device=self.device)
        given = ((segment.spans[i], gradients[segment.spans[i].parameter]) for i in present)
        found = [span.of(gradient) for span, gradient in given if gradient is not None]
        _copy(found, [staged_gradient[part] for part in slices])
        staged_states, kept, kept_staged = [], [], []
        for cuts in self._state_cuts[id(segment)]:
            staged = torch.zeros(size, dtype=torch.float32, device=self.device)
            staged_states.append(staged.view(-1, LANES, LANES))
            kept += [cuts[i] for i in present]
            kept_staged += [staged[part] for part in slices]
        _copy(kept, kept_staged)
        part = _Given(segment, staged_gradient.view(-1, LANES, LANES), staged_states)
        self._vote([part], hypers, zero_votes, words, keep_states)
        if not keep_states:
            _copy(kept_staged, kept)

    def _seed(self, dtype: torch.dtype, step: int, first: Span) -> Tensor:
        if dtype != torch.bfloat16:
            return self._no_seed
        return rounding_seed(step, first.parameter, first.start, self.device)


def _scale_of(segment: Segment, scales: Sequence[Tensor]) -> Tensor:
    """One for all of a segment, or one for each of its elements."""
    first = scales[segment.spans[0].parameter]
    if all(scales[span.parameter] is first for span in segment.spans):
        return first
    each = torch.ones(segment.blocks * BLOCK, dtype=torch.float32, device=first.device)
    for span, place in zip(segment.spans, segment.slices, strict=True):
        each[place] = scales[span.parameter]
    return each.view(-1, LANES, LANES)


def _squares(segment: Segment, decision: Decision) -> list[tuple[int, Tensor]]:
    planes = [plane.view(-1, LANES)[segment.rows] for plane in decision.planes]
    if not segment.staged:
        [span] = segment.spans
        return [(span.parameter, _squares_of_planes(planes, decision.highest, span.length))]
    levels = torch.stack([unpack_bits(plane).view(-1).long() << p for p, plane in enumerate(planes)]).sum(0)
    each = (2 * levels - decision.highest) ** 2
    return [(span.parameter, each[place].sum()) for span, place in zip(segment.spans, segment.slices, strict=True)]


def _squares_of_planes(planes: Sequence[Tensor], highest: int, elements: int) -> Tensor:
    """By 4 sum(c^2) - 4 n sum(c) + n^2, with c = sum of 2^p over the planes in which the bit is set."""
    levels, squares = torch.zeros((2,), dtype=torch.int64, device=planes[0].device)
    for p, plane in enumerate(planes):
        levels = levels + (popcount(plane) << p)
        for q, other in enumerate(planes):
            squares = squares + (popcount(plane & other) << (p + q))
    return 4 * squares - 4 * highest * levels + highest**2 * elements


def _cut(flat: Sequence[Tensor] | Mapping[int, Tensor], segment: Segment) -> list[Tensor]:
    if segment.staged:
        return [span.of(flat[span.parameter]) for span in segment.spans]
    return [_blocks(flat[span.parameter], span) for span in segment.spans]


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:
        torch._foreach_copy_(targets, sources)


def _blocks(flat: Tensor, span: Span) -> Tensor:
    shape = (span.length // BLOCK, LANES, LANES)
    return flat.as_strided(shape, (BLOCK, LANES, 1), flat.storage_offset() + span.start)
