"""The passes over parameters: vote, apply the decision, and a step without a vote; here in eager operations.

:mod:`native` has them in C, for CPUs, and :mod:`gpu` in Triton. All round every operation as the formula stands, so
they agree bit for bit.

``hyper`` is a float32 tensor [beta1, 1 - beta1, beta2, 1 - beta2, lr, weight_decay]. ``seed`` is that of the rounding
of bfloat16 parameters (``rounding``), int32 ``[1]``; others do not read it. ``scale``, float32 ``[1]`` or of the shape
of the parameter, multiplies the decision; None is 1. Shapes: B blocks, ``[B, 32, 32]``; their words, ``[B, 32]``.

Passes over a bucket take a list an argument, with an entry a segment; ``rows`` are the segments' places among the
bucket's blocks. What is in one list has one dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import BLOCK, pack_bits, unpack_bits
from .rounding import round_at_random

Tensors = Sequence[Tensor]
Rows = Sequence[slice]
Vote = Callable[[Tensors, Tensors, Tensors, Tensor, Tensor, Rows], None]
Sign = Callable[[Tensors, Tensor, Tensor, Rows], None]
Apply = Callable[[Tensors, Tensors, Tensors, Sequence[Tensor | None], int, Tensors, Rows], None]
Move = Callable[[Tensor, Tensor, Tensor], None]
Step = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None], None]


@dataclass(frozen=True)
class Kernels:
    """One implementation of the passes; all work in place.

    Attributes:
        vote: ``(gradients, momenta, hypers, zero_votes, words, rows)``: writes the packed signs of the directions
            into ``words``, and updates the momenta. ``zero_votes``, bool ``[32]``, is what a zero votes, by lane.
        sign: ``(directions, zero_votes, words, rows)``: writes the packed signs of directions that are given.
        move: ``(gradient, momentum, hyper)``: the momentum's part of ``vote``, on flat tensors.
        apply: ``(parameters, hypers, seeds, scales, highest, planes, rows)``: the update by the decision
            (``wire.exchange.Decision``), whose planes are ``[B, 32]``.
        step: ``(parameter, gradient, momentum, hyper, seed, scale)``: a whole step of Lion, for one worker, on flat
            tensors.
        peek: as ``vote``, and leaves the momenta as they are.
    """

    vote: Vote
    sign: Sign
    move: Move
    apply: Apply
    step: Step
    peek: Vote


def _step(
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    hyper: Tensor,
    seed: Tensor,
    scale: Tensor | None,
    first: int = 0,
) -> None:
    g = gradient.float()
    d = torch.sign(hyper[0] * momentum + hyper[1] * g)
    momentum.copy_(hyper[2] * momentum + hyper[3] * g)
    if scale is not None:
        d = d * scale
    x = parameter.float()
    _store(parameter, x - hyper[4] * (d + hyper[5] * x), seed, first)


def apply_signs(parameter: Tensor, decision: Tensor, hyper: Tensor, seed: Tensor, scale: Tensor) -> None:
    """The update by a decision that is not packed; flat tensors."""
    x = parameter.float()
    _store(parameter, x - hyper[4] * (decision * scale + hyper[5] * x), seed, 0)


def _store(parameter: Tensor, updated: Tensor, seed: Tensor, first: int) -> None:
    """Round to the parameter's dtype; ``first`` is the place of its first element."""
    if parameter.dtype == torch.bfloat16:
        elements = torch.arange(updated.numel(), dtype=torch.int32, device=updated.device).view(updated.shape) + first
        updated = round_at_random(updated, elements, seed)
    parameter.copy_(updated)


def _chunk(tensor: Tensor) -> int:
    """Blocks a chunk: what stays in a CPU's cache, or what keeps a GPU busy."""
    return 128 if tensor.device.type == "cpu" else 4096


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of the same blocks, a chunk of each at a time."""
    size = _chunk(tensors[0])
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _eager_vote(
    gradients: Tensors, momenta: Tensors, hypers: Tensors, zero_votes: Tensor, words: Tensor, rows: Rows
) -> None:
    for gradient, momentum, hyper, row in zip(gradients, momenta, hypers, rows, strict=True):
        for part, m, out in _chunks(gradient, momentum, words[row]):
            g = part.float()
            u = (m * hyper[0]).add_(g * hyper[1])
            m.mul_(hyper[2]).add_(g * hyper[3])
            pack_signs(u, zero_votes, out)


def _eager_peek(
    gradients: Tensors, momenta: Tensors, hypers: Tensors, zero_votes: Tensor, words: Tensor, rows: Rows
) -> None:
    for gradient, momentum, hyper, row in zip(gradients, momenta, hypers, rows, strict=True):
        for part, m, out in _chunks(gradient, momentum, words[row]):
            pack_signs((m * hyper[0]).add_(part.float() * hyper[1]), zero_votes, out)


def _eager_sign(directions: Tensors, zero_votes: Tensor, words: Tensor, rows: Rows) -> None:
    for direction, row in zip(directions, rows, strict=True):
        for part, out in _chunks(direction, words[row]):
            pack_signs(part, zero_votes, out)


def _eager_move(gradient: Tensor, momentum: Tensor, hyper: Tensor) -> None:
    size = _chunk(gradient) * BLOCK
    for g, m in zip(gradient.split(size), momentum.split(size), strict=True):
        m.mul_(hyper[2]).add_(g.float() * hyper[3])


def pack_signs(direction: Tensor, zero_votes: Tensor, words: Tensor) -> None:
    """As ``sign`` of :class:`Kernels`, in one piece."""
    bits = direction > 0
    bits |= (direction == 0) & zero_votes
    pack_bits(bits, words)


def _eager_apply(
    parameters: Tensors,
    hypers: Tensors,
    seeds: Tensors,
    scales: Sequence[Tensor | None],
    highest: int,
    planes: Tensors,
    rows: Rows,
) -> None:
    for parameter, hyper, seed, scale, row in zip(parameters, hypers, seeds, scales, rows, strict=True):
        _apply(parameter, hyper, seed, scale, highest, [plane[row] for plane in planes])


def _apply(parameter: Tensor, hyper: Tensor, seed: Tensor, scale: Tensor | None, highest: int, planes: Tensors) -> None:
    size = _chunk(parameter)
    scales = scale.split(size) if scale is not None and scale.dim() > 1 else None
    chunks = zip(parameter.split(size), *(plane.split(size) for plane in planes), strict=True)
    for index, (x, *parts) in enumerate(chunks):
        d = unpack_bits(parts[0]).float()
        for p, part in enumerate(parts[1:], 1):
            d.add_(unpack_bits(part), alpha=1 << p)
        d.mul_(2).sub_(highest).div_(d.new_full((), highest))  # a GPU multiplies by the inverse of a number
        if scale is not None:
            d.mul_(scale if scales is None else scales[index])
        wide = x.float()
        _store(x, wide - d.add_(wide * hyper[5]).mul_(hyper[4]), seed, index * size * BLOCK)


def _eager_step(
    parameter: Tensor, gradient: Tensor, momentum: Tensor, hyper: Tensor, seed: Tensor, scale: Tensor | None
) -> None:
    size = _chunk(gradient) * BLOCK
    chunks = zip(parameter.split(size), gradient.split(size), momentum.split(size), strict=True)
    for index, (x, g, m) in enumerate(chunks):
        _step(x, g, m, hyper, seed, scale, index * size)


EAGER = Kernels(_eager_vote, _eager_sign, _eager_move, _eager_apply, _eager_step, _eager_peek)
