"""Views on a GPU: what is done to a bucket, or to many parameters, is one launch."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from ..bits.devices import alignment, send_to
from ..bits.packing import BLOCK, LANES
from ..bits.rounding import place_of
from ..wire.exchange import Decision
from .layout import Bucket, Segment
from .views import SegmentViews, State, Views


@dataclass(frozen=True)
class _Tables:
    """Of a bucket, as :mod:`hf_dlion.bits.gpu` takes them.

    Attributes:
        pieces: all of its pieces.
        packing: the dtype, whether directions are given, the alignment of pieces, and the blocks, of each launch that
            packs.
        applying: the dtype, the alignment of pieces, and the blocks, of each launch that applies.
        places: by piece, ``place_of`` what its segment begins with.
    """

    pieces: Tensor
    packing: list[tuple[torch.dtype, bool, int, Tensor]]
    applying: list[tuple[torch.dtype, int, Tensor]]
    places: Tensor


@dataclass(frozen=True)
class _Addressed:
    """Tensors by parameter, with the addresses that kernels find them by; the tensors have to live until the launch.

    Attributes:
        tensors: those.
        addresses: int64, by parameter; 0 where there is none.
        verdict: int64 ``[1]``; unless it is -1, momenta stay as they are.
        align: ``devices.alignment`` of the addresses.
    """

    tensors: list[Tensor | None]
    addresses: Tensor
    verdict: Tensor
    align: int


class LaunchedViews(SegmentViews):
    """Segments whose kernels are launched together, by Triton.

    Args:
        buckets, state_names, device, group_of: as of the parent.
        state_name: of the momentum.
    """

    def __init__(
        self,
        buckets: Sequence[Bucket],
        state_names: Sequence[Sequence[str]],
        device: torch.device,
        group_of: Sequence[int],
        state_name: str,
    ) -> None:
        super().__init__(buckets, state_names, device, group_of)
        self._state_name = state_name
        self._tables: dict[int, _Tables] = {}
        self._chunks: dict[int, Tensor] = {}
        self._good = torch.full((1,), -1, dtype=torch.int64, device=device)
        self._staying = torch.zeros_like(self._good)
        self._absent: tuple[Container[int], Tensor]
        self._absent = frozenset(), torch.zeros(len(group_of), dtype=torch.int32, device=device)
        self._ones = torch.ones(len(group_of), dtype=torch.float32, device=device)
        begins = [place_of(index, 0) for index in range(len(group_of))]
        self._begins = torch.tensor(begins, dtype=torch.int32).to(device)

    @override
    def follow(self, parameters: Sequence[Tensor], states: Sequence[State]) -> None:
        before = self.parameters
        Views.follow(self, parameters, states)
        if self.parameters is not before:
            momenta = [state.get(self._state_name) for state in self.states]
            rows = [
                (parameter.data_ptr(), 0 if momentum is None else momentum.data_ptr(), len(parameter), group)
                for parameter, momentum, group in zip(self.parameters, momenta, self._group_of, strict=True)
            ]
            self._held = send_to(self.device, rows, torch.int64)
            self._align = alignment(*(address for row in rows for address in row[:2]))

    @override
    def given(self, gradients: Sequence[Tensor | None], verdict: Tensor | None) -> Any:
        dtypes = [
            parameter.dtype if self._state_names[group] else torch.float32
            for parameter, group in zip(self.parameters, self._group_of, strict=True)
        ]
        return self._addresses(gradients, dtypes, verdict)

    @override
    def pack(
        self,
        bucket: Bucket,
        given: Any,
        hypers: Tensor,
        zero_votes: Tensor,
        *,
        keep_states: bool = False,
    ) -> Tensor:
        from ..bits import gpu

        words = torch.empty(bucket.blocks * LANES, dtype=torch.int32, device=self.device)
        tables, verdict = self._tables_of(bucket), self._staying if keep_states else given.verdict
        for dtype, directed, align, blocks in tables.packing:
            tensors = blocks, tables.pieces, self._held, given.addresses, hypers, zero_votes, verdict, words
            gpu.vote(*tensors, dtype, directed, min(align, self._align, given.align))
        return words

    @override
    def move(self, gradients: Sequence[Tensor | None], hypers: Tensor, state_name: str) -> None:
        from ..bits import gpu

        given = self._addresses(gradients, [parameter.dtype for parameter in self.parameters])
        present = [i for i, g in enumerate(gradients) if g is not None and state_name in self.states[i]]
        for (dtype, align), chosen in self._by_dtype(present).items():
            chunks = self._chunks_of(chosen)
            gpu.direct(chunks, self._held, given.addresses, None, hypers, given.verdict, dtype, min(align, given.align))

    @override
    def apply(
        self,
        bucket: Bucket,
        decision: Decision,
        hypers: Tensor,
        step: int,
        absent: Container[int],
        scales: Sequence[Tensor] | None = None,
    ) -> None:
        from ..bits import gpu

        tables = self._tables_of(bucket)
        if absent != self._absent[0]:
            rows = [int(index in absent) for index in range(len(self._group_of))]
            self._absent = absent, send_to(self.device, rows, torch.int32)
        left_alone = self._absent[1]
        factors = self._ones if scales is None else torch.cat(list(scales))
        for dtype, align, blocks in tables.applying:
            tensors = blocks, tables.pieces, self._held, left_alone, hypers, tables.places, factors
            gpu.apply(*tensors, decision.planes, step, decision.highest, dtype, min(align, self._align))

    @override
    def squares(self, bucket: Bucket, decision: Decision) -> dict[int, Tensor]:
        from ..bits import gpu

        tables = self._tables_of(bucket)
        totals = torch.zeros(len(self._group_of), dtype=torch.int64, device=self.device)
        for _, directed, _, blocks in tables.packing:
            if directed:
                gpu.squares(blocks, tables.pieces, decision.planes, totals, decision.highest)
        return {i: totals[i] for i in bucket.parameters if not self._state_names[self._group_of[i]]}

    @override
    def step_alone(
        self,
        indices: Sequence[int],
        gradients: Sequence[Tensor | None],
        hypers: Tensor,
        step: int,
        scale: float = 1.0,
    ) -> None:
        from ..bits import gpu

        given = self._addresses(gradients, [parameter.dtype for parameter in self.parameters])
        for (dtype, align), chosen in self._by_dtype(indices).items():
            tensors = self._chunks_of(chosen), self._held, given.addresses, hypers, self._begins
            gpu.step(*tensors, step, scale, dtype, min(align, given.align))

    @override
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
        from ..bits import gpu

        outputs: list[Tensor | None] = [None] * len(self.parameters)
        for index in indices:
            outputs[index] = torch.empty(len(self.parameters[index]), dtype=torch.float32, device=self.device)
        written = self._addresses(outputs, [torch.float32] * len(outputs))
        dtypes = [parameter.dtype for parameter in self.parameters]
        given = self._addresses(gradients, dtypes, self._staying if keep else verdict)
        for (dtype, align), chosen in self._by_dtype(indices).items():
            tensors = self._chunks_of(chosen), self._held, given.addresses, written.addresses, hypers, given.verdict
            gpu.direct(*tensors, dtype, min(align, given.align, written.align))
        return [written.tensors[index] for index in indices]  # type: ignore[misc]

    def _by_dtype(self, indices: Sequence[int]) -> dict[tuple[torch.dtype, int], list[int]]:
        """Of each launch: the dtype, and the alignment of its parameters."""
        found: dict[tuple[torch.dtype, int], list[int]] = {}
        for index in indices:
            if length := len(self.parameters[index]):
                align = min(self._align, alignment(length))
                found.setdefault((self.parameters[index].dtype, align), []).append(index)
        return found

    def _addresses(
        self, tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype], verdict: Tensor | None = None
    ) -> _Addressed:
        kept = [None if t is None else t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
        found = [0 if t is None else t.data_ptr() for t in kept]
        addresses, judged = send_to(self.device, found, torch.int64), self._good if verdict is None else verdict
        return _Addressed(kept, addresses, judged, alignment(*found))

    def _chunks_of(self, indices: Sequence[int]) -> Tensor:
        for index in indices:
            if index not in self._chunks:
                chunks = torch.arange(-(-len(self.parameters[index]) // BLOCK), dtype=torch.int32)
                self._chunks[index] = torch.stack([torch.full_like(chunks, index), chunks], 1).to(self.device)
        return torch.cat([self._chunks[index] for index in indices])

    def _tables_of(self, bucket: Bucket) -> _Tables:
        if bucket.number not in self._tables:
            self._tables[bucket.number] = self._lay_out(bucket)
        return self._tables[bucket.number]

    def _lay_out(self, bucket: Bucket) -> _Tables:
        pieces: list[tuple[int, ...]] = []
        places: list[int] = []
        packing: dict[tuple[torch.dtype, bool, int], list[Tensor]] = {}
        applying: dict[tuple[torch.dtype, int], list[Tensor]] = {}
        for segment in bucket.segments:
            directed = not self._state_names[segment.group]
            blocks = _blocks_of(segment, len(pieces))
            spans = [(span.length, span.start) for span in segment.spans]
            align = alignment(*segment.starts, *(number for span in spans for number in span))
            packing.setdefault((segment.dtype, directed, align), []).append(blocks)
            applying.setdefault((segment.dtype, align), []).append(blocks)
            origin = segment.first_block * BLOCK
            for span, start in zip(segment.spans, segment.starts, strict=True):
                pieces.append((origin + start, span.length, span.parameter, span.start, origin))
                places.append(place_of(segment.spans[0].parameter, segment.spans[0].start))
        return _Tables(
            torch.tensor(pieces, dtype=torch.int64).view(-1, 5).to(self.device),
            [(*key, torch.cat(found).to(self.device)) for key, found in packing.items()],
            [(*key, torch.cat(found).to(self.device)) for key, found in applying.items()],
            torch.tensor(places, dtype=torch.int32).to(self.device),
        )


def _blocks_of(segment: Segment, first_piece: int) -> Tensor:
    """Int32 ``[blocks, 3]``: a block's number, and its pieces, counted from the segment's first one."""
    numbers = torch.arange(segment.blocks)
    starts = torch.tensor(segment.starts)
    ends = starts + torch.tensor([span.length for span in segment.spans])
    first = torch.searchsorted(ends, numbers * BLOCK, right=True)
    end = torch.searchsorted(starts, (numbers + 1) * BLOCK)
    found = torch.stack([numbers + segment.first_block, first + first_piece, end + first_piece], 1)
    return found.to(torch.int32)
