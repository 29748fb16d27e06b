"""The passes over parameters: vote, apply the decision, and a step without a vote; here in eager operations.

:mod:`native` has them in C, for CPUs, and :mod:`gpu` in Triton. All round every operation as the formula stands, so
they agree bit for bit.

``hyper`` is a float32 tensor [beta1, 1 - beta1, beta2, 1 - beta2, lr, weight_decay]. ``seed`` is that of the rounding
of bfloat16 parameters (``rounding``), int32 ``[1]``; others do not read it. ``scale``, float32 ``[1]`` or of the shape
of the parameter, multiplies the decision; None is 1. Shapes: B blocks, ``[B, 32, 32]``; their words, ``[B, 32]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .packing import BLOCK, pack_bits, unpack_bits
from .rounding import round_at_random

Vote = Callable[..., None]  # takes a varying number of states
Apply = Callable[[Tensor, Tensor, Tensor, Tensor | None, int, tuple[Tensor, ...]], None]
Move = Callable[[Tensor, Tensor, Tensor], None]
Step = Callable[..., None]


@dataclass(frozen=True)
class Kernels:
    """One implementation of the passes; all work in place.

    Attributes:
        vote: ``(gradient, momentum, hyper, zero_votes, words)``: writes the packed signs of the direction into
            ``words``, and updates the momentum. ``zero_votes``, bool ``[32]``, is what an exact zero votes, by lane.
        sign: ``(direction, hyper, zero_votes, words)``: writes the packed signs of a direction that is given.
        move: ``(gradient, momentum, hyper)``: the momentum's part of ``vote``, on flat tensors.
        apply: ``(parameter, hyper, seed, scale, highest, planes)``: the update by the decision
            (``wire.exchange.Decision``).
        step: ``(parameter, gradient, momentum, hyper, seed, scale)``: a whole step of Lion, for one worker, on flat
            tensors.
        peek: as ``vote``, and leaves the momentum as it is.
    """

    vote: Vote
    sign: Vote
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


def _eager_vote(gradient: Tensor, momentum: Tensor, hyper: Tensor, zero_votes: Tensor, words: Tensor) -> None:
    size = _chunk(gradient)
    for part, m, out in zip(gradient.split(size), momentum.split(size), words.split(size), strict=True):
        g = part.float()
        u = (m * hyper[0]).add_(g * hyper[1])
        m.mul_(hyper[2]).add_(g * hyper[3])
        pack_signs(u, zero_votes, out)


def _eager_peek(gradient: Tensor, momentum: Tensor, hyper: Tensor, zero_votes: Tensor, words: Tensor) -> None:
    size = _chunk(gradient)
    for part, m, out in zip(gradient.split(size), momentum.split(size), words.split(size), strict=True):
        pack_signs((m * hyper[0]).add_(part.float() * hyper[1]), zero_votes, out)


def _eager_sign(direction: Tensor, hyper: Tensor, zero_votes: Tensor, words: Tensor) -> None:
    size = _chunk(direction)
    for part, out in zip(direction.split(size), words.split(size), strict=True):
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
    parameter: Tensor,
    hyper: Tensor,
    seed: Tensor,
    scale: Tensor | None,
    highest: int,
    planes: tuple[Tensor, ...],
) -> None:
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
