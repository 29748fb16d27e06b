"""The passes over parameters and gradients, the counting of votes and the check of gradients in C, for CPUs: bit for
bit those of :mod:`kernels`, :mod:`dither` and :mod:`counting`, at the speed of memory.

``passes.c`` is compiled at the first use, in a second, and kept in the user's cache. It needs a C compiler (``cc``, or
what the environment variable CC names) and no headers but the compiler's own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import counting, dither
from .counting import RULES, Count, Tally
from .kernels import EAGER, Kernels, Rows, Tensors
from .packing import BLOCK

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("passes.c")
FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fno-fast-math", "-shared", "-fPIC")

NATIVE_FROM = 1 << 20
"""Parameters from which on compiling, a second the first time on a machine, pays."""

_MOST_VOTERS = (1 << 16) - 1
"""That ``passes.c`` can count."""

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}

_EXPONENTS = {torch.float32: (32, 0x7F800000), torch.bfloat16: (16, 0x7F80), torch.float16: (16, 0x7C00)}
"""By dtype its bits, and which of them an Inf or a NaN has all of."""


@functools.cache
def load_passes() -> Kernels | None:
    """The passes; None, with a warning, where they cannot be compiled or loaded. Float16 parameters step eagerly."""
    library = _library()
    if library is None:
        return None
    return Kernels(
        functools.partial(_vote, library, "vote"),
        functools.partial(_sign, library),
        functools.partial(_move, library),
        functools.partial(_apply, library),
        functools.partial(_step, library),
        functools.partial(_vote, library, "peek"),
    )


@functools.cache
def load_count() -> Count | None:
    """``counting.tally``; None, with a warning, where it cannot be compiled or loaded."""
    library = _library()
    return None if library is None else functools.partial(_tally, library)


@functools.cache
def load_dither() -> dither.Passes | None:
    """Those of votes on gradients; None, with a warning, where they cannot be compiled or loaded."""
    library = _library()
    if library is None:
        return None
    return dither.Passes(functools.partial(_pack_dithered, library), functools.partial(_settle, library))


@functools.cache
def load_find_bad() -> Callable[[Tensors], int] | None:
    """The index of the first tensor with an Inf or a NaN, or -1; None, with a warning, where it cannot be had."""
    library = _library()
    return None if library is None else functools.partial(_find_bad, library)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or error
        logger.warning(
            "votes are made and applied in eager mode, which is several times slower: the passes in C could not be "
            "compiled. A C compiler (gcc, clang) on the path, or named by CC, makes it work. The cause: %s",
            said,
        )
        return None


def _compiled() -> Path:
    """The library, compiled now unless it is in the cache."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    # What -march=native means differs from machine to machine, and a home can be that of several.
    key = hashlib.sha256(repr((SOURCE.read_bytes(), FLAGS, compiler, version, _processor())).encode()).hexdigest()
    name = f"passes-{key[:32]}.so"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "hf_dlion")
        folder.mkdir(parents=True, exist_ok=True)
        if Path(folder, name).exists():
            return Path(folder, name)
        own = tempfile.TemporaryDirectory(dir=folder)
    except (OSError, RuntimeError):  # a home that is not there, or that nothing can be written to
        folder = Path(tempfile.mkdtemp(prefix="hf_dlion_"))
        own = tempfile.TemporaryDirectory(dir=folder)
    library = folder / name
    with own:
        made = Path(own.name, "passes.so")
        for threads in (["-fopenmp"], []):  # Apple's clang has no OpenMP
            command = [*compiler, *FLAGS, *threads, str(SOURCE), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                break
        done.check_returncode()
        os.replace(made, library)
    return library


def _processor() -> str:
    """What the processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()} {platform.node()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _call(function: Any, *arguments: Any) -> Any:
    """With tensors as pointers to their data."""
    return function(*(ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else value for value in arguments))


def _pointers(tensors: Sequence[Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def _numbers(numbers: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(numbers))(*numbers)


def _counts(elements: int) -> tuple[ctypes.c_int64, int]:
    return ctypes.c_int64(elements), torch.get_num_threads()


def _segments(rows: Rows) -> tuple[Any, Any, int, int]:
    """Where each begins, and its blocks; how many there are; and threads."""
    begins, blocks = [row.start for row in rows], [row.stop - row.start for row in rows]
    return _numbers(begins), _numbers(blocks), len(rows), torch.get_num_threads()


def _vote(
    library: Any,
    name: str,
    gradients: Tensors,
    momenta: Tensors,
    hypers: Tensors,
    zero_votes: Tensor,
    words: Tensor,
    rows: Rows,
) -> None:
    kind = _NAMES.get(gradients[0].dtype)
    if kind is None:
        (EAGER.vote if name == "vote" else EAGER.peek)(gradients, momenta, hypers, zero_votes, words, rows)
        return
    lists = _pointers(gradients), _pointers(momenta), _pointers(hypers)
    _call(getattr(library, f"{name}_{kind}"), *lists, zero_votes, words, *_segments(rows))


def _sign(library: Any, directions: Tensors, zero_votes: Tensor, words: Tensor, rows: Rows) -> None:
    _call(library.sign_float, _pointers(directions), zero_votes, words, *_segments(rows))


def _move(library: Any, gradient: Tensor, momentum: Tensor, hyper: Tensor) -> None:
    kind = _NAMES.get(gradient.dtype)
    if kind is None:
        EAGER.move(gradient, momentum, hyper)
        return
    _call(getattr(library, f"move_{kind}"), gradient, momentum, hyper, *_counts(len(gradient)))


def _apply(
    library: Any,
    parameters: Tensors,
    hypers: Tensors,
    seeds: Tensors,
    scales: Sequence[Tensor | None],
    highest: int,
    planes: Tensors,
    rows: Rows,
) -> None:
    kind = _NAMES.get(parameters[0].dtype)
    if kind is None or highest > _MOST_VOTERS:
        EAGER.apply(parameters, hypers, seeds, scales, highest, planes, rows)
        return
    sizes = _numbers([0 if scale is None else scale.numel() for scale in scales])
    lists = _pointers(parameters), _pointers(hypers), _pointers(seeds), _pointers(scales), sizes
    decision = highest, _pointers(planes), len(planes)
    _call(getattr(library, f"apply_{kind}"), *lists, *decision, *_segments(rows))


def _step(
    library: Any,
    parameter: Tensor,
    gradient: Tensor,
    momentum: Tensor,
    hyper: Tensor,
    seed: Tensor,
    scale: Tensor | None,
) -> None:
    kind = _NAMES.get(parameter.dtype)
    if kind is None or gradient.dtype != parameter.dtype:
        EAGER.step(parameter, gradient, momentum, hyper, seed, scale)
        return
    function = getattr(library, f"step_{kind}")
    _call(function, parameter, gradient, momentum, hyper, seed, scale, *_counts(len(parameter)))


def _tally(library: Any, votes: Sequence[Tensor], rule: str, step: int, sample: range) -> Tally:
    voters, words = len(votes), len(votes[0])
    if voters > _MOST_VOTERS or not all(vote.is_contiguous() for vote in votes):
        return counting.tally(votes, rule, step, sample)
    planes = voters.bit_length() if rule == "avg" else 2 if rule == "zero" and voters % 2 == 0 else 1
    decided = [torch.empty_like(votes[0]) for _ in range(planes)]
    sums = (ctypes.c_int64 * 2)()
    library.tally(
        _pointers(votes),
        voters,
        RULES.index(rule),
        step & 1,
        _pointers(decided),
        ctypes.c_int64(words),
        ctypes.c_int64(sample.stop),
        ctypes.c_int64(sample.step),
        sums,
        torch.get_num_threads(),
    )
    return Tally(decided, *sums)


def _pack_dithered(
    library: Any, flat: Tensor, sizes: Sequence[int], seeds: Sequence[int], widths: Tensor | None, turn: int
) -> Tensor:
    kind = _NAMES.get(flat.dtype)
    if kind is None or flat.device.type != "cpu" or not flat.is_contiguous():
        return dither.pack(flat, sizes, seeds, widths, turn)
    words = flat.new_zeros(-(-len(flat) // BLOCK) * 32, dtype=torch.int32)
    given = flat.new_zeros(len(sizes), dtype=torch.float32) if widths is None else widths.contiguous()
    noise = (ctypes.c_uint32 * len(seeds))(*seeds), given
    function, threads = getattr(library, f"dither_{kind}"), torch.get_num_threads()
    _call(function, flat, _numbers(sizes), *noise, len(sizes), turn & 1, words, threads)
    return words


def _settle(
    library: Any, flat: Tensor, sizes: Sequence[int], scales: Tensor, highest: int, planes: Sequence[Tensor]
) -> None:
    kind = _NAMES.get(flat.dtype)
    known = kind is not None and flat.device.type == "cpu" and highest <= _MOST_VOTERS
    if not known or not all(one.is_contiguous() for one in (flat, *planes)):
        dither.settle(flat, sizes, scales, highest, planes)
        return
    decision = highest, _pointers(planes), len(planes)
    function, threads = getattr(library, f"settle_{kind}"), torch.get_num_threads()
    _call(function, flat, _numbers(sizes), scales.contiguous(), len(sizes), *decision, threads)


def _find_bad(library: Any, tensors: Tensors) -> int:
    kinds: dict[torch.dtype | None, list[int]] = {}
    for index, tensor in enumerate(tensors):
        known = tensor.dtype in _EXPONENTS and tensor.is_contiguous()
        kinds.setdefault(tensor.dtype if known else None, []).append(index)
    found = [index for index in kinds.pop(None, []) if not bool(tensors[index].isfinite().all())]
    for kind, indices in kinds.items():
        assert kind is not None
        bits, exponent = _EXPONENTS[kind]
        chosen = [tensors[index] for index in indices]
        sizes, threads = _numbers([tensor.numel() for tensor in chosen]), torch.get_num_threads()
        first = getattr(library, f"find_bad_{bits}")(_pointers(chosen), sizes, len(chosen), exponent, threads)
        found += [] if first == -1 else [indices[first]]
    return min(found, default=-1)
