"""The passes over parameters and gradients in Triton, for GPUs: bit for bit those of :mod:`kernels` and :mod:`dither`,
one launch for many tensors.

Tensors are given by their addresses, by parameter, 0 for none: ``given``, int64 ``[parameters]``, the gradients or
directions of a step; ``held``, int64 ``[parameters, 4]``, the parameter, its momentum, its length and the number of its
param group. ``hypers`` is float32 ``[groups, 6]``, by group as :mod:`kernels` has them. All are flat.

A launch that packs or unpacks words has a program for each of a bucket's blocks of 1024 signs. ``blocks``, int32
``[n, 3]``, tells it the block's number, and which pieces are in it, from the first to the one after the last.
``pieces``, int64 ``[k, 5]``, says of a piece where it begins in the bucket, its length, its parameter, where it begins
there, and where its segment begins in the bucket.

A launch without words has a program for each 1024 elements of a parameter; ``chunks``, int32 ``[n, 2]``, tells it the
parameter, and the number of the chunk.

``align`` is the ``devices.alignment`` of all addresses, and of lengths and starts in pieces, or of parameters' lengths.

Importing this module needs Triton.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import dither
from .counting import Tally
from .devices import alignment, send_to
from .packing import BLOCK, LANES

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_ROWS: tl.constexpr = tl.constexpr(LANES)
_BLOCK: tl.constexpr = tl.constexpr(BLOCK)
_WORDS: tl.constexpr = tl.constexpr(512)
_READ: tl.constexpr = tl.constexpr(4096)
_PARTS: tl.constexpr = tl.constexpr(256)
_WARPS, _WARPS_OF_A_BLOCK = 4, 2
"""On an H200, vote and update of several blocks a program, or more warps, together took up to 38 % more time."""


def vote(
    blocks: Tensor,
    pieces: Tensor,
    held: Tensor,
    given: Tensor,
    hypers: Tensor,
    zero_votes: Tensor,
    verdict: Tensor,
    words: Tensor,
    dtype: torch.dtype,
    directed: bool,
    align: int,
) -> None:
    """Write the packed signs of directions into ``words``; unless these are given, as float32, move momenta on.

    ``verdict``, int64 ``[1]``, is -1, or else momenta stay as they are.
    """
    tensors = blocks, pieces, held, given, hypers, zero_votes, verdict, words
    given_as = tl.float32 if directed else TYPES[dtype]
    _launch(_vote, len(blocks), *tensors, given_as, directed, align, warps=_WARPS_OF_A_BLOCK)


def apply(
    blocks: Tensor,
    pieces: Tensor,
    held: Tensor,
    absent: Tensor,
    hypers: Tensor,
    places: Tensor,
    scales: Tensor,
    planes: Sequence[Tensor],
    step: int,
    highest: int,
    dtype: torch.dtype,
    align: int,
) -> None:
    """The update by a decision, whose planes are int32 ``[W]``.

    ``absent``, int32, and ``scales``, float32, are by parameter; ``places``, int32, by piece (``rounding.place_of``).
    """
    first, apart = _equally_apart(planes)
    tensors = blocks, pieces, held, absent, hypers, places, scales, first
    sizes = step, apart, *_division_by(highest), len(planes)
    _launch(_apply, len(blocks), *tensors, *sizes, TYPES[dtype], align, warps=_WARPS_OF_A_BLOCK)


def squares(blocks: Tensor, pieces: Tensor, planes: Sequence[Tensor], totals: Tensor, highest: int) -> None:
    """Add the squares of levels 2c - n of a decision to ``totals``, int64 by parameter."""
    first, apart = _equally_apart(planes)
    _launch(_squares, len(blocks), blocks, pieces, first, totals, apart, highest, len(planes))


def direct(
    chunks: Tensor,
    held: Tensor,
    given: Tensor,
    outputs: Tensor | None,
    hypers: Tensor,
    verdict: Tensor,
    dtype: torch.dtype,
    align: int,
) -> None:
    """Write directions, float32, to ``outputs``, addresses by parameter or None; move momenta on, as :func:`vote`."""
    tensors = chunks, held, given, given if outputs is None else outputs, hypers, verdict
    _launch(_direct, len(chunks), *tensors, TYPES[dtype], outputs is not None, align)


def step(
    chunks: Tensor,
    held: Tensor,
    given: Tensor,
    hypers: Tensor,
    places: Tensor,
    step: int,
    scale: float,
    dtype: torch.dtype,
    align: int,
) -> None:
    """A whole step of Lion, for one worker, its signs times ``scale``; ``places``, int32, by parameter."""
    _launch(_step, len(chunks), chunks, held, given, hypers, places, step, scale, TYPES[dtype], align)


def tally(votes: Sequence[Tensor], rule: str, step: int, sample: range) -> Tally:
    """As :func:`hf_dlion.bits.counting.tally`."""
    voters, (words,), device = len(votes), votes[0].shape, votes[0].device
    planes = voters.bit_length() if rule == "avg" else 2 if rule == "zero" and voters % 2 == 0 else 1
    decided = torch.empty((planes, words), dtype=torch.int32, device=device)
    sums = torch.zeros(2, dtype=torch.int64, device=device)
    first, apart = _equally_apart(votes)
    width = max(4, 1 << (voters.bit_length() - 1).bit_length())
    sizes = words, apart, step & 1, sample.stop, sample.step
    _launch(_tally, -(-words // _WORDS.value), first, decided, sums, *sizes, voters, rule, planes, width)
    return Tally(list(decided), sums[0], sums[1])


def pack_dithered(flat: Tensor, sizes: Sequence[int], seeds: Sequence[int], widths: Tensor | None, turn: int) -> Tensor:
    """As :func:`hf_dlion.bits.dither.pack`."""
    if not _takes(flat):
        return dither.pack(flat, sizes, seeds, widths, turn)
    words = torch.empty(-(-len(flat) // BLOCK) * LANES, dtype=torch.int32, device=flat.device)
    ends, those = send_to(flat.device, [list(itertools.accumulate(sizes)), seeds], torch.int64)
    tensors = flat, ends, those, ends if widths is None else widths.contiguous(), words
    numbers = len(flat), len(sizes), turn & 1, widths is not None
    _launch(_pack_dithered, len(words) // LANES, *tensors, *numbers, warps=_WARPS_OF_A_BLOCK)
    return words


def settle(flat: Tensor, sizes: Sequence[int], scales: Tensor, highest: int, planes: Sequence[Tensor]) -> None:
    """As :func:`hf_dlion.bits.dither.settle`."""
    if not _takes(flat):
        dither.settle(flat, sizes, scales, highest, planes)
        return
    first, apart = _equally_apart(planes)
    ends = send_to(flat.device, list(itertools.accumulate(sizes)), torch.int64)
    numbers = len(flat), len(sizes), apart, *_division_by(highest), len(planes)
    tensors = flat, ends, scales.contiguous(), first
    _launch(_settle, -(-len(flat) // BLOCK), *tensors, *numbers, warps=_WARPS_OF_A_BLOCK)


def _takes(flat: Tensor) -> bool:
    """Whether kernels can: places are int32."""
    return flat.dtype in TYPES and flat.is_contiguous() and len(flat) <= (1 << 31) - 2 * BLOCK


DITHER = dither.Passes(pack_dithered, settle)


def _division_by(highest: int) -> tuple[int, float, bool]:
    """What kernels divide by, its reciprocal, and whether that is exact, of a power of 2."""
    return highest, 1 / highest, highest & highest - 1 == 0


def _equally_apart(rows: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Words to begin with, and by how many each row follows the one before; of copies, where that is not one number."""
    bases = [row.data_ptr() for row in rows]
    apart = {after - before for before, after in itertools.pairwise(bases)} or {0}
    if len(apart) == 1 and all(row.is_contiguous() for row in rows):
        return rows[0], apart.pop() // 4
    return torch.stack(list(rows)), len(rows[0])


def first_bad(gradients: Sequence[Tensor | None], device: torch.device, finite: Tensor | None = None) -> Tensor:
    """The index of the first gradient with a NaN or Inf, int64 ``[1]``; -1 if there is none.

    Args:
        gradients: to be judged.
        device: theirs.
        finite: bool ``[]``, whether all of them are, if that is known; they are not read then.
    """
    dense = [None if gradient is None else _dense(gradient) for gradient in gradients]
    rows: dict[tuple[torch.dtype, int], list[tuple[int, int, int]]] = {}
    for index, gradient in enumerate(dense):
        if gradient is not None:
            place = gradient.data_ptr(), gradient.numel()
            rows.setdefault((gradient.dtype, alignment(*place)), []).append((*place, index))
    verdict = torch.full((1,), -1, dtype=torch.int64, device=device)
    for (dtype, align), those in rows.items():
        table = send_to(device, those, torch.int64)
        if finite is not None:
            table[:, 1] *= ~finite  # of length 0
        _launch(_first_bad, len(those) * _PARTS.value, table, verdict, TYPES[dtype], align)
    return verdict


def try_out(device: torch.device) -> None:
    """Launch each kernel once, on one element; raises whatever Triton raises where they do not work."""

    def one(*values: int) -> Tensor:
        return torch.tensor([values], dtype=torch.int64, device=device)

    def zeros(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=device)

    hypers, number = zeros(1, 6), torch.zeros(1, dtype=torch.int32, device=device)
    blocks, chunks = one(0, 0, 1).int(), one(0, 0).int()
    pieces, verdict, planes = one(0, 1, 0, 0, 0), one(-1)[0], torch.zeros((1, LANES), dtype=torch.int32, device=device)
    zero_votes, totals = torch.zeros(LANES, dtype=torch.bool, device=device), torch.zeros_like(verdict)
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    for dtype in (torch.float32,) if old else (torch.float32, torch.bfloat16):  # an old one may only lack the latter
        values, momentum = torch.zeros(1, dtype=dtype, device=device), zeros(1)
        held, given = one(values.data_ptr(), momentum.data_ptr(), 1, 0), one(values.data_ptr())[0]
        vote(blocks, pieces, held, given, hypers, zero_votes, verdict, planes[0], dtype, directed=False, align=1)
        apply(blocks, pieces, held, number, hypers, number, momentum, [planes[0]], 0, 1, dtype, align=1)
        direct(chunks, held, given, one(momentum.data_ptr())[0], hypers, verdict, dtype, align=1)
        direct(chunks, held, given, None, hypers, verdict, dtype, align=1)
        step(chunks, held, given, hypers, number, 0, 1.0, dtype, align=1)
        first_bad([values], device)
        pack_dithered(values, [1], [1], momentum, 0)
        settle(values, [1], momentum, 1, [planes[0]])
    squares(blocks, pieces, [planes[0]], totals, 1)
    tally([planes[0]], "zero", 0, range(1))


def _dense(tensor: Tensor) -> Tensor:
    """The same elements without gaps, in any order, of a type that kernels take; a copy only where there is need."""
    known = tensor if tensor.dtype in TYPES else tensor.float()
    if known.is_contiguous():  # as nearly all are, and a step has hundreds
        return known
    in_memory = known.permute(sorted(range(known.dim()), key=known.stride, reverse=True))
    return known if in_memory.is_contiguous() else known.contiguous()


def _launch(kernel: Any, programs: int, first: Tensor, *others: Any, warps: int = _WARPS) -> None:
    # Triton launches on the current GPU, whichever has the tensors. A multiplication and an addition that become one
    # instruction would be rounded once, where all other implementations round twice.
    with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
        kernel[(programs,)](first, *others, num_warps=warps, enable_fp_fusion=False)


@triton.jit
def _rows_and_lanes():
    return tl.arange(0, _ROWS)[:, None], tl.arange(0, _ROWS)[None, :]


@triton.jit
def _from(address, start, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A pointer to an element of a tensor."""
    return tl.multiple_of(address.to(tl.pointer_type(TYPE)), ALIGN) + start


@triton.jit
def _mixed(beta, rest, m, g):
    return tl.load(beta) * m + tl.load(rest) * g


@triton.jit
def _scatter(elements, seed):
    h = elements ^ seed
    h = (h ^ ((h >> 16) & 0xFFFF)) * 0x7FEB352D
    h = (h ^ ((h >> 15) & 0x1FFFF)) * -0x7B935975
    return h ^ ((h >> 16) & 0xFFFF)


@triton.jit
def _store(pointer, updated, elements, place, step, inside, TYPE: tl.constexpr):
    if TYPE == tl.bfloat16:
        noise = _scatter(elements, _scatter(place, step) & 0x7FFFFFFF) & 0xFFFF
        updated = ((updated.to(tl.int32, bitcast=True) + noise) & -0x10000).to(tl.float32, bitcast=True)
    tl.store(pointer, updated.to(TYPE), inside)


@triton.jit
def _vote(
    blocks,
    pieces,
    held,
    given,
    hypers,
    zero_votes,
    verdict,
    words,
    TYPE: tl.constexpr,
    DIRECTED: tl.constexpr,
    ALIGN: tl.constexpr,
):
    entry = blocks + 3 * tl.program_id(0)
    block = tl.load(entry)
    rows, lanes = _rows_and_lanes()
    place = block * _BLOCK + rows * _ROWS + lanes
    direction = tl.zeros((_ROWS, _ROWS), tl.float32)
    p = tl.load(entry + 1)
    while p < tl.load(entry + 2):  # the interpreter of Triton 3.6 has no range over tensors with NumPy 2.4
        piece = pieces + 5 * p
        parameter = tl.load(piece + 2)
        address = tl.load(given + parameter)
        start = tl.multiple_of(tl.load(piece + 3), ALIGN)
        at, inside = _inside(place, piece, ALIGN)
        inside &= address != 0
        g = tl.load(_from(address, start, TYPE, ALIGN) + at, inside, 0.0).to(tl.float32)
        if DIRECTED:
            direction = tl.where(inside, g, direction)
        else:
            momentum = _from(tl.load(held + 4 * parameter + 1), start, tl.float32, ALIGN) + at
            m = tl.load(momentum, inside, 0.0)
            hyper = hypers + 6 * tl.load(held + 4 * parameter + 3)
            direction = tl.where(inside, _mixed(hyper, hyper + 1, m, g), direction)
            tl.store(momentum, _mixed(hyper + 2, hyper + 3, m, g), inside & (tl.load(verdict) < 0))
        p += 1
    votes = (direction > 0) | ((direction == 0) & (tl.load(zero_votes + lanes) != 0))
    tl.store(words + block * _ROWS + tl.arange(0, _ROWS), tl.sum(votes.to(tl.int32) << rows, 0))


@triton.jit
def _inside(place, piece, ALIGN: tl.constexpr):
    """Of places in a bucket: where in the piece, and whether in it."""
    at = place - tl.multiple_of(tl.load(piece).to(tl.int32), ALIGN)
    return at, (at >= 0) & (at < tl.multiple_of(tl.load(piece + 1).to(tl.int32), ALIGN))


@triton.jit(do_not_specialize=["step"])
def _apply(
    blocks,
    pieces,
    held,
    absent,
    hypers,
    places,
    scales,
    planes,
    step,
    apart,
    highest,
    inverse,
    EXACT: tl.constexpr,
    PLANES: tl.constexpr,
    TYPE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    entry = blocks + 3 * tl.program_id(0)
    level, place = _levels(planes, apart, tl.load(entry), PLANES)
    decision = _mean(level, highest, inverse, EXACT)
    p = tl.load(entry + 1)
    while p < tl.load(entry + 2):  # the interpreter of Triton 3.6 has no range over tensors with NumPy 2.4
        piece = pieces + 5 * p
        parameter = tl.load(piece + 2)
        at, inside = _inside(place, piece, ALIGN)
        inside &= tl.load(absent + parameter) == 0
        start = tl.multiple_of(tl.load(piece + 3), ALIGN)
        pointer = _from(tl.load(held + 4 * parameter), start, TYPE, ALIGN) + at
        hyper = hypers + 6 * tl.load(held + 4 * parameter + 3)
        x = tl.load(pointer, inside, 0.0).to(tl.float32)
        updated = x - tl.load(hyper + 4) * (decision * tl.load(scales + parameter) + tl.load(hyper + 5) * x)
        elements = place - tl.load(piece + 4).to(tl.int32)
        _store(pointer, updated, elements, tl.load(places + p), step, inside, TYPE)
        p += 1


@triton.jit
def _mean(level, highest, inverse, EXACT: tl.constexpr):
    decision = (2 * level - highest).to(tl.float32)
    if EXACT:
        decision *= inverse
    else:
        decision = tl.div_rn(decision, (tl.zeros((_ROWS, _ROWS), tl.int32) + highest).to(tl.float32))
    return decision


@triton.jit
def _squares(blocks, pieces, planes, totals, apart, highest, PLANES: tl.constexpr):
    entry = blocks + 3 * tl.program_id(0)
    level, place = _levels(planes, apart, tl.load(entry), PLANES)
    p = tl.load(entry + 1)
    while p < tl.load(entry + 2):
        piece = pieces + 5 * p
        _, inside = _inside(place, piece, 1)
        each = tl.where(inside, 2 * level - highest, 0)
        tl.atomic_add(totals + tl.load(piece + 2), tl.sum(tl.sum(each * each, 1).to(tl.int64), 0))
        p += 1


@triton.jit
def _levels(planes, apart, block, PLANES: tl.constexpr):
    """Levels of a decision, and their places in the bucket."""
    rows, lanes = _rows_and_lanes()
    level = tl.zeros((_ROWS, _ROWS), tl.int32)
    for plane in tl.static_range(PLANES):
        level += ((tl.load(planes + plane * apart + block * _ROWS + lanes) >> rows) & 1) << plane
    return level, block * _BLOCK + rows * _ROWS + lanes


@triton.jit(do_not_specialize=["parts", "turn"])
def _pack_dithered(flat, ends, seeds, widths, words, elements, parts, turn, NOISY: tl.constexpr):
    block = tl.program_id(0)
    rows, lanes = _rows_and_lanes()
    place = block * _BLOCK + rows * _ROWS + lanes
    x = tl.load(flat + place, place < elements, 0.0).to(tl.float32)
    moved = x
    element = place - elements  # of padding
    p = _first_part(ends, parts, block * _BLOCK)
    begin = tl.load(ends + p - 1, p > 0, 0)
    while (p < parts) & (begin < (block + 1) * _BLOCK):
        end = tl.load(ends + p)
        inside = (place >= begin) & (place < end)
        element = tl.where(inside, place - begin.to(tl.int32), element)
        if NOISY:
            noise = _scatter(place - begin.to(tl.int32), tl.load(seeds + p).to(tl.int32)).to(tl.float32)
            moved = tl.where(inside, noise * 4.656612873077393e-10 * tl.load(widths + p) + x, moved)  # 2^-31
        begin = end
        p += 1
    votes = tl.where(x == 0, ((element + turn) & 1) != 0, moved > 0)
    tl.store(words + block * _ROWS + tl.arange(0, _ROWS), tl.sum(votes.to(tl.int32) << rows, 0))


@triton.jit(do_not_specialize=["parts", "apart"])
def _settle(
    flat,
    ends,
    scales,
    planes,
    elements,
    parts,
    apart,
    highest,
    inverse,
    EXACT: tl.constexpr,
    PLANES: tl.constexpr,
):
    block = tl.program_id(0)
    level, place = _levels(planes, apart, block, PLANES)
    scale = tl.zeros((_ROWS, _ROWS), tl.float32)
    p = _first_part(ends, parts, block * _BLOCK)
    begin = tl.load(ends + p - 1, p > 0, 0)
    while (p < parts) & (begin < (block + 1) * _BLOCK):
        end = tl.load(ends + p)
        scale = tl.where((place >= begin) & (place < end), tl.load(scales + p), scale)
        begin = end
        p += 1
    decided = _mean(level, highest, inverse, EXACT) * scale
    tl.store(flat + place, decided, place < elements)


@triton.jit
def _first_part(ends, parts, place):
    """Of the parts that end there, in order: the number of that with a place."""
    low = tl.full((), 0, tl.int32)
    high = low + parts
    while low < high:
        middle = (low + high) // 2
        before = tl.load(ends + middle) <= place
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _chunk(chunks, held, ALIGN: tl.constexpr):
    """Of a program: its parameter, where it begins in it, and which of its elements are there."""
    parameter = tl.load(chunks + 2 * tl.program_id(0)).to(tl.int64)
    start = tl.load(chunks + 2 * tl.program_id(0) + 1).to(tl.int64) * _BLOCK
    at = tl.arange(0, _BLOCK)
    return parameter, start, at, start + at < tl.multiple_of(tl.load(held + 4 * parameter + 2), ALIGN)


@triton.jit
def _direct(
    chunks, held, given, outputs, hypers, verdict, TYPE: tl.constexpr, WRITES: tl.constexpr, ALIGN: tl.constexpr
):
    parameter, start, at, inside = _chunk(chunks, held, ALIGN)
    momentum = _from(tl.load(held + 4 * parameter + 1), start, tl.float32, ALIGN) + at
    hyper = hypers + 6 * tl.load(held + 4 * parameter + 3)
    g = tl.load(_from(tl.load(given + parameter), start, TYPE, ALIGN) + at, inside, 0.0).to(tl.float32)
    m = tl.load(momentum, inside, 0.0)
    if WRITES:
        output = _from(tl.load(outputs + parameter), start, tl.float32, ALIGN) + at
        tl.store(output, _mixed(hyper, hyper + 1, m, g), inside)
    tl.store(momentum, _mixed(hyper + 2, hyper + 3, m, g), inside & (tl.load(verdict) < 0))


@triton.jit(do_not_specialize=["step"])
def _step(chunks, held, given, hypers, places, step, scale, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    parameter, start, at, inside = _chunk(chunks, held, ALIGN)
    pointer = _from(tl.load(held + 4 * parameter), start, TYPE, ALIGN) + at
    momentum = _from(tl.load(held + 4 * parameter + 1), start, tl.float32, ALIGN) + at
    hyper = hypers + 6 * tl.load(held + 4 * parameter + 3)
    g = tl.load(_from(tl.load(given + parameter), start, TYPE, ALIGN) + at, inside, 0.0).to(tl.float32)
    m = tl.load(momentum, inside, 0.0)
    x = tl.load(pointer, inside, 0.0).to(tl.float32)
    direction = _mixed(hyper, hyper + 1, m, g)
    decision = (direction > 0).to(tl.float32) - (direction < 0).to(tl.float32)
    tl.store(momentum, _mixed(hyper + 2, hyper + 3, m, g), inside)
    updated = x - tl.load(hyper + 4) * (decision * scale + tl.load(hyper + 5) * x)
    _store(pointer, updated, (start + at).to(tl.int32), tl.load(places + parameter), step, inside, TYPE)


@triton.jit
def _first_bad(rows, verdict, TYPE: tl.constexpr, ALIGN: tl.constexpr):
    """A row is the address of a gradient, its length and its index; _PARTS programs read it together."""
    entry = rows + 3 * (tl.program_id(0) // _PARTS)
    address = tl.load(entry)
    length = tl.multiple_of(tl.load(entry + 1), ALIGN)
    start = (tl.program_id(0) % _PARTS).to(tl.int64) * _READ
    at = tl.arange(0, _READ)
    bad = tl.zeros((_READ,), tl.int32)
    while start < length:
        x = tl.load(_from(address, start, TYPE, ALIGN) + at, start + at < length, 0.0).to(tl.float32)
        bad |= (~(tl.abs(x) < float("inf"))).to(tl.int32)
        start += _PARTS * _READ
    first = verdict.to(tl.pointer_type(tl.uint64), bitcast=True)  # where -1 is the largest
    tl.atomic_min(first, tl.load(entry + 2).to(tl.uint64), mask=tl.sum(bad, 0) > 0)


@triton.jit(do_not_specialize=["words", "apart", "step", "stop", "every"])
def _tally(
    votes,
    decided,
    sums,
    words,
    apart,
    step,
    stop,
    every,
    VOTERS: tl.constexpr,
    RULE: tl.constexpr,
    PLANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Counts are fields of ``WIDTH`` bits: integer r of a word has those of its bits r, r + WIDTH, r + 2 WIDTH, ..."""
    place = tl.program_id(0) * _WORDS + tl.arange(0, _WORDS)
    inside = place < words
    rows = tl.arange(0, WIDTH)[:, None]
    ones: tl.constexpr = 0xFFFFFFFF // ((1 << WIDTH) - 1)  # a 1 in each field
    count = tl.zeros((WIDTH, _WORDS), tl.int32)
    everyone, anyone = tl.full((_WORDS,), -1, tl.int32), tl.zeros((_WORDS,), tl.int32)
    for voter in range(VOTERS):
        word = tl.load(votes + voter * apart.to(tl.int64) + place, inside, 0)
        count += (word[None, :] >> rows) & ones
        everyone &= word
        anyone |= word
    # A field's highest bit is set from half its range on.
    ahead = ((count + ones * ((1 << WIDTH - 1) - 1 - VOTERS // 2)) >> (WIDTH - 1)) & ones
    tied = tl.zeros((WIDTH, _WORDS), tl.int32)
    if VOTERS % 2 == 0:
        tied = ahead ^ (((count + ones * ((1 << WIDTH - 1) - VOTERS // 2)) >> (WIDTH - 1)) & ones)
    looked = inside & (place < stop) & (place % every == 0)
    _add(sums, tl.where(looked, everyone | ~anyone, 0))
    _add(sums + 1, tl.where(looked, tl.sum(tied << rows, 0), 0))
    for plane in tl.static_range(PLANES):
        if RULE == "avg":
            chosen = (count >> plane) & ones
        elif RULE == "alternate":
            chosen = ahead | tl.where(((place + step) & 1 == 1)[None, :], tied, 0)
        elif PLANES == 2 and plane == 0:
            chosen = tied
        else:
            chosen = ahead
        tl.store(decided + plane * words + place, tl.sum(chosen << rows, 0), inside)


@triton.jit
def _add(total, these):
    """The number of bits that are set, as ``counting.popcount``."""
    pairs = these - ((these >> 1) & 0x55555555)
    quads = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    octets = (quads + (quads >> 4)) & 0x0F0F0F0F
    number = tl.sum((octets * 0x01010101) >> 24, 0)
    tl.atomic_add(total, number.to(tl.int64), mask=number > 0)
