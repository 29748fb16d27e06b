"""The passes of one step over all parameters: pack the votes, apply the decision, or step alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..wire.exchange import Decision, Exchange, Sent
from ..wire.packing import BLOCK, LANES
from .kernels import EAGER, Kernels
from .layout import Bucket, Piece, Segment
from .rounding import rounding_seed

Gradients = list[Tensor | None]


class Passes:
    """Views of the parameters and momenta as the layout cuts them, and what is done to them.

    Args:
        parameters: of all groups in order.
        momenta: theirs, with the same strides.
        orders: the memory order of each (``layout.memory_order``).
        buckets: the layout.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        momenta: Sequence[Tensor],
        orders: Sequence[tuple[int, ...]],
        buckets: Sequence[Bucket],
    ) -> None:
        self.buckets = buckets
        self.orders = orders
        self.device = parameters[0].device
        self.parameters = [_flat(p, order) for p, order in zip(parameters, orders, strict=True)]
        self.momenta = [_flat(m, order) for m, order in zip(momenta, orders, strict=True)]
        self._pointers = _pointers(parameters, momenta)
        self._no_seed = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._cuts = {
            id(segment): (self._cut(self.parameters, segment), self._cut(self.momenta, segment))
            for bucket in buckets
            for segment in bucket.segments
        }

    def still_of(self, parameters: Sequence[Tensor], momenta: Sequence[Tensor]) -> bool:
        """Whether these still are views of them; not so once ``parameter.data`` or a momentum was replaced."""
        return self._pointers == _pointers(parameters, momenta)

    def vote_and_apply(
        self,
        exchange: Exchange,
        kernels: Kernels,
        gradients: Gradients,
        hypers: Sequence[Tensor],
        step: int,
        note: Tensor,
        check: Callable[[Tensor], list[int]],
    ) -> None:
        """Exchange bucket after bucket; while one is on its way, the next is packed, and the one before applied.

        Args:
            exchange: the workers.
            kernels: which implementation.
            gradients: of all parameters; None votes zero and leaves the momentum.
            hypers: for each param group, as the kernels take it.
            step: its parity is that of the zero votes; rounding depends on it.
            note: int32 ``[H]``, sent with the first bucket.
            check: given everyone's note, ``[N, H]``, before the first parameter changes; returns the ranks whose
                votes count, or raises. Where there are none, no parameter changes.
        """
        flat = self._flat_gradients(gradients)
        lanes = torch.arange(LANES, device=self.device)
        zero_votes = ((lanes + exchange.channel.rank + step) & 1).bool()
        voters: list[int] = []

        def decide(bucket: Bucket, sent: Sent) -> Callable[[], Decision | None]:
            votes, notes = exchange.receive(sent, bucket.words)
            if notes.shape[1]:
                voters.extend(check(notes))
            if not voters:
                return lambda: None
            counted = votes if len(voters) == len(votes) else votes[voters]
            return exchange.decide(counted, bucket.words, step, bucket.padding_share)

        def apply(bucket: Bucket, decision: Decision | None) -> None:
            if decision is None:
                return
            # A decision of fewer voters can have other levels, for which nothing was compiled.
            those = kernels if len(voters) == exchange.channel.size else EAGER
            planes = [plane.view(-1, LANES) for plane in decision.planes]
            for segment in bucket.segments:
                part = tuple(plane[segment.rows] for plane in planes)
                self._apply(segment, _for_size(those, segment), hypers[segment.group], step, decision.top, part)

        sent: list[tuple[Bucket, Sent]] = []
        decided: list[tuple[Bucket, Callable[[], Decision | None]]] = []
        for bucket in [*self.buckets, None, None]:
            if bucket is not None:
                words = torch.empty((bucket.blocks, LANES), dtype=torch.int32, device=self.device)
                for segment in bucket.segments:
                    out = words[segment.rows]
                    self._vote(segment, _for_size(kernels, segment), hypers[segment.group], flat, zero_votes, out)
                sent.append((bucket, exchange.send(words.view(-1), note)))
                note = note[:0]
            # Two buckets are on their way up, or one up and one down, while a third is packed or applied.
            if len(sent) == 2 or (bucket is None and sent):
                earlier, parcel = sent.pop(0)
                decided.append((earlier, decide(earlier, parcel)))
            if len(decided) == 2 or (bucket is None and decided):
                earlier, decision = decided.pop(0)
                apply(earlier, decision())

    def alone(self, kernels: Kernels, gradients: Gradients, hypers: Iterable[Tensor], step: int) -> None:
        """Lion without a vote.

        Args:
            kernels: which implementation.
            gradients: of all parameters; one without is left alone.
            hypers: for each parameter.
            step: rounding depends on it.
        """
        flat = self._flat_gradients(gradients)
        for index, (x, g, m, hyper) in enumerate(zip(self.parameters, flat, self.momenta, hypers, strict=True)):
            if g is not None:
                seed = self._seed(x.dtype, step, index, 0)
                (kernels if len(g) >= BLOCK else EAGER).lone(x, g, m, hyper, seed)

    def _flat_gradients(self, gradients: Gradients) -> Gradients:
        return [None if g is None else _flat(g, order) for g, order in zip(gradients, self.orders, strict=True)]

    def _cut(self, flat: Sequence[Tensor], segment: Segment) -> list[Tensor]:
        cut = _part if segment.staged else _blocks
        return [cut(flat[piece.parameter], piece) for piece in segment.pieces]

    def _vote(
        self,
        segment: Segment,
        kernels: Kernels,
        hyper: Tensor,
        gradients: Gradients,
        zero_votes: Tensor,
        out: Tensor,
    ) -> None:
        _, momenta = self._cuts[id(segment)]
        if not segment.staged:
            [piece] = segment.pieces
            gradient = gradients[piece.parameter]
            if gradient is None:
                out.copy_(-zero_votes.to(torch.int32))
            else:
                kernels.vote(_blocks(gradient, piece), momenta[0], hyper, zero_votes, out)
            return
        # Zeros where there is no gradient: they vote zero, and the momentum there is not written back.
        staged_gradient = torch.zeros(segment.blocks * BLOCK, dtype=segment.dtype, device=self.device)
        staged_momentum = torch.zeros(segment.blocks * BLOCK, device=self.device)
        sources, targets, kept, kept_staged = [], [], [], []
        for piece, place, momentum in zip(segment.pieces, segment.places, momenta, strict=True):
            gradient = gradients[piece.parameter]
            if gradient is not None:
                sources.append(_part(gradient, piece))
                targets.append(staged_gradient[place])
                kept.append(momentum)
                kept_staged.append(staged_momentum[place])
        _copy(sources, targets)
        _copy(kept, kept_staged)
        kernels.vote(
            staged_gradient.view(-1, LANES, LANES), staged_momentum.view(-1, LANES, LANES), hyper, zero_votes, out
        )
        _copy(kept_staged, kept)

    def _apply(
        self, segment: Segment, kernels: Kernels, hyper: Tensor, step: int, top: int, planes: tuple[Tensor, ...]
    ) -> None:
        parameters, _ = self._cuts[id(segment)]
        seed = self._seed(segment.dtype, step, segment.pieces[0].parameter, segment.pieces[0].start)
        if not segment.staged:
            kernels.apply(parameters[0], hyper, seed, top, planes)
            return
        staged = torch.zeros(segment.blocks * BLOCK, dtype=segment.dtype, device=self.device)
        places = [staged[place] for place in segment.places]
        _copy(parameters, places)
        kernels.apply(staged.view(-1, LANES, LANES), hyper, seed, top, planes)
        _copy(places, parameters)

    def _seed(self, dtype: torch.dtype, step: int, parameter: int, start: int) -> Tensor:
        return rounding_seed(step, parameter, start, self.device) if dtype == torch.bfloat16 else self._no_seed


def _for_size(kernels: Kernels, segment: Segment) -> Kernels:
    # One block would be compiled anew: torch.compile takes a size of one for a constant.
    return kernels if segment.blocks > 1 else EAGER


def _copy(sources: list[Tensor], targets: list[Tensor]) -> None:
    if sources:
        torch._foreach_copy_(targets, sources)


def _part(flat: Tensor, piece: Piece) -> Tensor:
    return flat[piece.start : piece.start + piece.length]


def _blocks(flat: Tensor, piece: Piece) -> Tensor:
    shape = (piece.length // BLOCK, LANES, LANES)
    return flat.as_strided(shape, (BLOCK, LANES, 1), flat.storage_offset() + piece.start)


def _flat(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """The elements in the memory order of the parameter; a view where the tensor has that order itself."""
    if tensor.is_contiguous() and order == tuple(range(tensor.dim())):
        return tensor.detach().view(-1)
    return tensor.detach().permute(order).reshape(-1)


def _pointers(parameters: Sequence[Tensor], momenta: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensors in (parameters, momenta) for tensor in tensors]
