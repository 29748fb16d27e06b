"""The passes in C against the eager ones, bit for bit."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hf_dlion.bits import counting, dither
from hf_dlion.bits.counting import RULES
from hf_dlion.bits.kernels import EAGER, Kernels
from hf_dlion.bits.native import _compiled, load_count, load_dither, load_find_bad, load_passes

HYPER = torch.tensor([0.9, 1 - 0.9, 0.99, 1 - 0.99, 3e-3, 0.1])
OTHER = torch.tensor([0.8, 1 - 0.8, 0.95, 1 - 0.95, 1e-3, 0.0])
ZERO_VOTES = torch.arange(32) % 2 == 0
SEED = torch.tensor([123456789], dtype=torch.int32)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = 14
ROWS = [slice(0, 11), slice(12, 14)]
"""Of two segments: one has twice what passes.c works on side by side, and a rest; and a block belongs to none."""


@pytest.fixture(scope="module")
def native() -> Kernels:
    passes = load_passes()
    assert passes is not None
    return passes


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Numbers of all magnitudes, zeros of both signs, subnormal ones."""
    source = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=source) * 10 ** torch.randn(shape, generator=source).mul(6)
    kinds = torch.randint(10, shape, generator=source)
    values[kinds == 0] = 0.0
    values[kinds == 1] = -0.0
    values[kinds == 2] *= 1e-40
    return values.nan_to_num(posinf=1e30, neginf=-1e30)


def split(*tensors: Tensor) -> list[list[Tensor]]:
    """What each segment has of tensors, ``[B, 32, 32]``."""
    return [[tensor[row] for row in ROWS] for tensor in tensors]


def same(one: Tensor, other: Tensor) -> bool:
    """Bit for bit, signs of zeros included."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(kind), other.view(kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["vote", "peek", "move"])
@pytest.mark.usefixtures("threads")
def test_votes(native: Kernels, name: str, dtype: torch.dtype) -> None:
    gradient = drawn(BLOCKS, 32, 32, seed=1).clamp(-6e4, 6e4).to(dtype)
    results = []
    for kernels in (EAGER, native):
        momentum, words = drawn(BLOCKS, 32, 32, seed=2), torch.zeros(BLOCKS, 32, dtype=torch.int32)
        if name == "move":
            kernels.move(gradient.view(-1)[:-7], momentum.view(-1)[:-7], HYPER)
        else:
            getattr(kernels, name)(*split(gradient, momentum), [HYPER, OTHER], ZERO_VOTES, words, ROWS)
        results.append((momentum, words))
    assert all(same(one, other) for one, other in zip(*results, strict=True))
    assert (results[0][1] != 0).any() == (name != "move")
    assert same(results[0][0], drawn(BLOCKS, 32, 32, seed=2)) == (name == "peek")


@pytest.mark.usefixtures("threads")
def test_signs_of_directions(native: Kernels) -> None:
    words = [torch.zeros(BLOCKS, 32, dtype=torch.int32) for _ in range(2)]
    for kernels, out in zip((EAGER, native), words, strict=True):
        kernels.sign(*split(drawn(BLOCKS, 32, 32)), ZERO_VOTES, out, ROWS)
    assert torch.equal(*words)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("highest", [1, 2, 3, 4, 5, 8, 11])
@pytest.mark.parametrize("scales", [0, 1, 1024])
@pytest.mark.usefixtures("threads")
def test_updates(native: Kernels, dtype: torch.dtype, highest: int, scales: int) -> None:
    levels = torch.randint(highest + 1, (BLOCKS, 32, 32), generator=torch.Generator().manual_seed(3))
    rows = torch.arange(32).view(1, 32, 1)
    planes = tuple(((levels >> p & 1) << rows).sum(1).to(torch.int32) for p in range(highest.bit_length()))
    each = drawn(BLOCKS, 32, 32).abs()
    own = {0: [None, None], 1: [each[0, 0, :1], None], 1024: [each[row] for row in ROWS]}[scales]
    results = []
    for kernels in (EAGER, native):
        parameter = drawn(BLOCKS, 32, 32, seed=4).clamp(-6e4, 6e4).to(dtype)
        kernels.apply(*split(parameter), [HYPER, OTHER], [SEED, SEED + 1], own, highest, planes, ROWS)
        results.append(parameter)
    assert same(*results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.usefixtures("threads")
def test_a_step_alone(native: Kernels, dtype: torch.dtype, scale: float | None) -> None:
    results = []
    for kernels in (EAGER, native):
        parameter, momentum = drawn(4999, seed=5).clamp(-6e4, 6e4).to(dtype), drawn(4999, seed=6)
        gradient = drawn(4999, seed=7).clamp(-6e4, 6e4).to(dtype)
        kernels.step(parameter, gradient, momentum, HYPER, SEED, None if scale is None else torch.tensor([scale]))
        results.append((parameter, momentum))
    assert all(itertools.starmap(same, zip(*results, strict=True)))


def test_the_library_is_compiled_once_and_kept(tmp_path: Path) -> None:
    script = (
        "import logging, sys, hf_dlion.bits.native as native\n"
        "logging.basicConfig()\n"
        "print(native.load_passes() is not None)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    where: list[float] = []
    for compiler in ("cc", "cc", "no-such-compiler"):
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment | {"CC": compiler}, capture_output=True, text=True
        )
        assert done.stdout.split() == [str(compiler == "cc")], done.stderr
        where += [library.stat().st_mtime for library in tmp_path.glob("hf_dlion/*.so")]
    assert len(where) == 3
    assert len(set(where)) == 1
    assert "no-such-compiler" in done.stderr


def test_a_home_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert _compiled().is_relative_to(tmp_path)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 31, 33, 64])
def test_counting(voters: int, rule: str) -> None:
    count = load_count()
    assert count is not None
    source = torch.Generator().manual_seed(voters)
    for words, sample in ((1, range(0)), (300, range(0, 290, 3)), (1030, range(1030)), (512, range(0, 512, 257))):
        cast = list(torch.randint(-(2**31), 2**31, (voters, words), dtype=torch.int32, generator=source))
        for vote in cast:
            vote[::5] = cast[0][::5]  # some are unanimous
        for step in (6, 7):
            ours, eager = count(cast, rule, step, sample), counting.tally(cast, rule, step, sample)
            assert all(itertools.starmap(torch.equal, zip(ours.planes, eager.planes, strict=True)))
            assert (ours.unanimous, ours.ties) == (int(eager.unanimous), int(eager.ties))
            assert words < 300 or voters == 1 or 0 < ours.unanimous < 32 * len(sample)
            assert (ours.ties > 0) == (voters % 2 == 0 and words >= 300)


SIZES = [5, 0, 1019, 1024, 3000, 33, 131072, 2047, 7 * 1024 + 1]
"""Of parameters in a bucket: within a block, empty, of whole blocks, over edges of several; the last one is padded."""


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("noisy", [True, False])
@pytest.mark.parametrize("turn", [6, 7])
def test_votes_on_gradients(dtype: torch.dtype, noisy: bool, turn: int) -> None:
    native = load_dither()
    assert native is not None
    flat = drawn(sum(SIZES), seed=9).clamp(-6e4, 6e4).to(dtype)
    flat[::4001] = float("nan")
    widths = torch.tensor([1e-3, 0.0, 1.0, float("nan"), 1e3, -2.0, 2.0, float("inf"), 30.0]) if noisy else None
    seeds = [2**31 - 1 - 12345 * part for part in range(len(SIZES))]
    given = flat, SIZES, seeds, widths, turn
    one, other = dither.EAGER.pack(*given), native.pack(*given)
    assert same(one, other)
    assert (one == dither.EAGER.pack(*given[:-1], turn + 1)).sum() < len(one) / 10


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("highest", [1, 2, 3, 4, 7, 8, 11])
def test_decisions_as_gradients(dtype: torch.dtype, highest: int) -> None:
    native = load_dither()
    assert native is not None
    blocks = -(-sum(SIZES) // 1024)
    levels = torch.randint(highest + 1, (blocks, 32, 32), generator=torch.Generator().manual_seed(10))
    rows = torch.arange(32).view(1, 32, 1)
    planes = [((levels >> p & 1) << rows).sum(1).to(torch.int32).flatten() for p in range(highest.bit_length())]
    scales = torch.tensor([1.0, 1.0, 0.0, 1 / 3, 65536.0, 1.7, 0.3, float("nan"), 3.0])
    one, other = (torch.zeros(sum(SIZES), dtype=dtype) for _ in range(2))
    dither.EAGER.settle(one, SIZES, scales, highest, planes)
    native.settle(other, SIZES, scales, highest, planes)
    assert torch.equal(one.isnan(), other.isnan())
    assert same(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))
    expected = (2 * levels.flatten()[: sum(SIZES)] - highest).float() / highest
    first, last = slice(0, 5), slice(-SIZES[-1], None)
    assert torch.equal(one[first], expected[first].to(dtype))
    assert torch.equal(one[last], (expected[last] * 3).to(dtype))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 3 * 4096 + 1234])
def test_bad_values(size: int, dtype: torch.dtype) -> None:
    find_bad = load_find_bad()
    assert find_bad is not None
    values = drawn(size, seed=8).clamp(-6e4, 6e4).to(dtype)
    largest = torch.full((1,), torch.finfo(dtype).max, dtype=dtype)
    assert find_bad([largest, values, largest]) == -1
    for place in {0, 1, 1023, 1024, 4096, 8191, 3 * 4096, size // 2, size - 2, size - 1} & set(range(size)):
        for bad in (float("nan"), float("inf"), -float("inf")):
            kept = values[place].clone()
            values[place] = bad
            assert find_bad([largest, values, largest]) == 1
            values[place] = kept


def test_the_first_of_several_bad_values() -> None:
    find_bad = load_find_bad()
    assert find_bad is not None
    bad = float("nan")
    # Of several dtypes; and with gaps in memory, which are of no account.
    gaps = torch.zeros(64, 64)
    gaps[:, 1::2] = bad
    good, bads = [torch.zeros(9, dtype=kind) for kind in DTYPES], [torch.full((9,), bad, dtype=kind) for kind in DTYPES]
    assert find_bad([*good, gaps[:, ::2]]) == -1
    assert find_bad([*good, gaps[:, ::2], gaps.t(), *bads]) == 4
    for index, one in enumerate(bads):
        assert find_bad([*good[:index], one, *bads]) == index
