"""Triton's passes beside the eager ones, in Triton's interpreter; a process of its own, which no import came before.

TRITON_INTERPRET=1 python -m tests.optim.launched METHOD WORKERS
"""

from __future__ import annotations

import itertools
import os
import sys
from functools import partial
from threading import Lock
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor

from hf_dlion import DistributedLion, DistributedMuon
from hf_dlion.bits import counting, dither, gpu
from hf_dlion.bits.devices import alignment
from hf_dlion.optim import layout
from hf_dlion.optim.overlap import EarlyVotes
from hf_dlion.optim.signed_gradients import VirtualGradients
from hf_dlion.optim.virtual import VirtualWorkers
from tests.harness import run_workers
from tests.kernels import use_kernels
from tests.optim import test_overlap as overlap

METHODS = {
    "dlion": DistributedLion,
    "dmuon": DistributedMuon,
    "averages": partial(DistributedMuon, rest="average"),
}
# Sizes that fill no word, a block and its rest, one that is worked on in place with a rest, and a split matrix.
SHAPES = [(7,), (3, 11), (), (0,), (9, 120), (13, 1301)]
CASES = [
    (torch.float32, "mavo", "alternate"),
    (torch.bfloat16, "mavo", "zero"),
    (torch.float32, "avg", "zero"),
    (torch.float16, "avg", "zero"),
]
STEPS = 3
LONG = 4096 * 600
if os.environ.get("TRITON_INTERPRET") == "1":  # where each program takes milliseconds
    gpu._PARTS, LONG = tl.constexpr(2), 4096 * 5


def groups(method: str, parameters: list[torch.nn.Parameter]) -> list[Any]:
    if method == "dlion":
        return parameters
    hidden = [{"params": parameters[4:5], "orthogonal": True, "split": (1, 60, 60)}]
    hidden += [{"params": parameters[5:], "orthogonal": True}]
    return [*hidden, {"params": parameters[:4], "orthogonal": False, "weight_decay": 0.0}]


def gradients(rank: int, step: int, dtype: torch.dtype) -> list[Tensor | None]:
    """A third zeros; of one parameter none on some ranks and none at all at times, and once a bad one."""
    source = torch.Generator().manual_seed(1000 * step + rank)
    drawn: list[Tensor | None] = []
    for shape in SHAPES:
        gradient = torch.randn(shape, generator=source).mul(4).round().div(4)
        drawn.append((gradient * (torch.rand(shape, generator=source) > 1 / 3)).to(dtype))
    if rank == 0 or step == 1:
        drawn[1] = drawn[4] = None
    if rank == 1 and step == 2:
        drawn[0] = torch.full((7,), torch.inf, dtype=dtype)
    return drawn


def train(kernels: str, method: str, workers: int, dtype: torch.dtype, aggregation: str, tie: str) -> list[Tensor]:
    use_kernels(kernels)
    source = torch.Generator().manual_seed(1)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=source).to(dtype)) for shape in SHAPES]
    options: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1, "aggregation": aggregation, "tie": tie}
    made: Any = groups(method, parameters)
    kind = METHODS[method]
    optimizer: Any = kind(made, **options) if workers == 1 else VirtualWorkers(made, workers, kind, **options)
    for step in range(STEPS):
        for rank in range(workers):
            for parameter, gradient in zip(parameters, gradients(rank, step, dtype), strict=True):
                parameter.grad = gradient
            if workers > 1:
                optimizer.next_worker()
        optimizer.step()
    states = [held for member in optimizer.members for state in member.state.values() for held in state.values()]
    assert optimizer.members[0].plan.views.__class__.__name__.startswith(kernels.capitalize()) == (
        kernels == "launched"
    )
    return [*(parameter.detach() for parameter in parameters), *states]


def check_counts(device: str = "cpu") -> None:
    source = torch.Generator().manual_seed(0)
    sizes = ((1, range(0)), (130, range(0, 120, 3)), (1100, range(1100)))
    for voters, (words, sample) in [*itertools.product((1, 2, 3, 4, 5, 9, 16), sizes), (256, sizes[1])]:
        rows = torch.randint(-(2**31), 2**31, (voters, words + 6), dtype=torch.int32, generator=source)
        rows[:, ::5] = rows[0, ::5]  # some are unanimous
        rows[: voters // 2, ::7], rows[voters // 2 :, ::7] = -1, 0  # and some half and half
        received = [row[:words] for row in rows.to(device)]
        apart = [received[0], *(vote.clone() for vote in received[1:])]
        casts = [(received, *case) for case in itertools.product(counting.RULES, (6, 7))]
        for cast, rule, step in [*casts, (apart, "zero", 6)]:
            ours, eager = gpu.tally(cast, rule, step, sample), counting.tally(cast, rule, step, sample)
            assert all(itertools.starmap(torch.equal, zip(ours.planes, eager.planes, strict=True)))
            assert (int(ours.unanimous), int(ours.ties)) == (int(eager.unanimous), int(eager.ties))


def gradients_of_all_sizes(size: int) -> Tensor:
    """With zeros, and NaN and Inf."""
    source = torch.Generator().manual_seed(size)
    drawn = torch.randn(size, generator=source) * 10 ** torch.randn(size, generator=source).mul(3).clamp(-5, 5)
    drawn[torch.rand(size, generator=source) < 0.2] = 0.0
    drawn.clamp_(-6e4, 6e4)
    drawn[::1003], drawn[1::1009], drawn[2::1013] = torch.nan, -torch.inf, torch.inf
    return drawn


def check_dither(device: str = "cpu") -> None:
    """Votes on gradients, of parts within a block, empty, of whole blocks, and over the edges of several."""
    for sizes in ([5, 0, 1019, 1024, 3000, 33, 0], [1], [0, 2048], [0, 0, 7]):
        elements, parts = sum(sizes), len(sizes)
        widths = torch.tensor([1e-3, 0.0, torch.nan, 1.0, 1e3, -2.0, torch.inf], device=device)[:parts]
        seeds = [2**31 - 1 - 12345 * part for part in range(parts)]
        for dtype in (*gpu.TYPES, torch.float64):
            flat = gradients_of_all_sizes(elements).to(device, dtype)
            for noise, turn in ((widths, 6), (widths, 7), (None, 7)):
                ours, eager = (pack(flat, sizes, seeds, noise, turn) for pack in (gpu.pack_dithered, dither.pack))
                assert torch.equal(ours, eager), (sizes, dtype, turn)
            for highest in (1, 2, 3, 7, 8):
                check_settled(flat, sizes, highest)


def check_voted() -> None:
    """Votes on gradients of three workers, from end to end."""
    decided = {}
    for kernels in ("launched", "eager"):
        use_kernels(kernels)
        parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        votes = VirtualGradients(((str(i), parameter) for i, parameter in enumerate(parameters)), 3)
        assert all((member._passes is gpu.DITHER) == (kernels == "launched") for member in votes.members)
        for step in range(STEPS):
            for rank in range(3):
                for parameter, gradient in zip(parameters, gradients(rank, step, torch.float32), strict=True):
                    parameter.grad = gradient
                votes.take_turn(rank)
            votes.decide()
            decided[kernels, step] = [torch.zeros(1) if p.grad is None else p.grad for p in parameters]
        assert votes.bad_gradients == 1
    for step in range(STEPS):
        assert all(map(torch.equal, decided["launched", step], decided["eager", step]))
        assert any((gradient.abs() == 1).any() for gradient in decided["eager", step])


def check_settled(flat: Tensor, sizes: list[int], highest: int) -> None:
    scales = [0.5, 65536.0, torch.nan, 0.0, 1.7, 2.0, 1 / 3]
    if flat.device.type == "cpu" and flat.dtype == torch.bfloat16:  # which the interpreter does not round to nearest
        highest, scales = 1 << highest.bit_length() - 1, [0.5, 4.0, 0.25, 0.0, 1.0, 2.0, 8.0]
    source = torch.Generator().manual_seed(highest)
    levels = torch.randint(highest + 1, (-(-len(flat) // 1024), 32, 32), generator=source)
    rows = torch.arange(32).view(1, 32, 1)
    planes = [((levels >> p & 1) << rows).sum(1).int().flatten() for p in range(highest.bit_length())]
    given = sizes, torch.tensor(scales[: len(sizes)]).to(flat.device), highest, [one.to(flat.device) for one in planes]
    ours, eager = flat.clone(), flat.clone()
    gpu.settle(ours, *given)
    dither.settle(eager, *given)
    assert torch.equal(ours.isnan(), eager.isnan())
    assert torch.equal(ours.nan_to_num(nan=7.0), eager.nan_to_num(nan=7.0)), (sizes, flat.dtype, highest)


def good_gradients(dtype: torch.dtype, device: str) -> list[Tensor | None]:
    """Long, scalar, empty, with gaps and from an odd place on, in another order of memory, and none."""
    shapes = ((LONG,), (), (0,), (33, 34), (4, 3, 5, 8))
    ones = [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]
    return [*ones[:3], ones[3][:, 1:].t(), ones[4].to(memory_format=torch.channels_last), None]


def check_first_bad(device: str = "cpu") -> None:
    for dtype in (*gpu.TYPES, torch.float64):
        assert int(gpu.first_bad(good_gradients(dtype, device), torch.device(device))) == -1
        for worst, place in ((4, (3, 2, 4, 7)), (3, (32, 32)), (1, ()), (0, (-1,)), (0, (LONG // 2,))):
            for bad in (torch.nan, -torch.inf):
                gradients = good_gradients(dtype, device)
                for spoiled in (gradients[4], gradients[worst]):
                    spoiled[place if spoiled is gradients[worst] else (0, 0, 0, 0)] = bad  # type: ignore[index]
                assert int(gpu.first_bad(gradients, torch.device(device))) == worst, (dtype, worst, place, bad)


def check_norms(device: str = "cpu") -> None:
    """Gradients whose norm is finite are not read again, unless they have changed."""
    good, spoiled = good_gradients(torch.float32, device), good_gradients(torch.float32, device)
    spoiled[0][LONG // 2] = torch.nan  # type: ignore[index]
    for finite, first in ((True, -1), (False, 0)):
        for gradients, expected in ((good, -1), (spoiled, first)):
            found = gpu.first_bad(gradients, torch.device(device), torch.tensor(finite, device=device))
            assert int(found) == expected
    if device == "cpu":
        use_kernels("launched")
    for counted in (False, True):
        parameter = torch.nn.Parameter(torch.ones(50, device=device))
        optimizer = VirtualWorkers([parameter], 2, DistributedLion)
        for step in range(2):
            for rank, member in enumerate(optimizer.members):
                gradient = parameter.grad = torch.full((50,), 1.0 + rank, device=device)
                optimizer.next_worker()
                member.agreement.known_finite.note_norm([gradient], gradient.norm())
            if step == 1:
                (gradient if counted else gradient.data)[3] = torch.nan
            optimizer.step()
        assert optimizer.bad_gradients == counted


def check_what_kernels_are_told() -> None:
    """From now on, at each launch: the interpreter takes no notice of what is aligned."""
    launch = gpu._launch

    def checked(kernel: Any, programs: int, first: Tensor, *others: Any, **options: Any) -> None:
        told.update([(kernel.__name__, others[-1])] if kernel.__name__ in ALIGNED else [])
        if kernel.__name__ in ALIGNED and others[-1] == 16:
            assert not any(bool((numbers % 16).any()) for numbers in ALIGNED[kernel.__name__](first, *others))
        launch(kernel, programs, first, *others, **options)

    gpu._launch = checked


def _of_blocks(blocks: Tensor, pieces: Tensor, held: Tensor, *given: Tensor) -> list[Tensor]:
    named = pieces[torch.cat([torch.arange(int(first), int(end)) for _, first, end in blocks]).unique()]
    parameters = named[:, 2]
    return [named[:, [0, 1, 3]], held[parameters, :2], *(addresses[parameters] for addresses in given)]


def _of_chunks(chunks: Tensor, held: Tensor, *given: Tensor) -> list[Tensor]:
    parameters = chunks[:, 0].unique().long()
    return [held[parameters, :3], *(addresses[parameters] for addresses in given)]


ALIGNED: dict[str, Any] = {
    "_vote": lambda *given: _of_blocks(*given[:4]),
    "_apply": lambda *given: _of_blocks(*given[:3]),
    "_direct": lambda *given: _of_chunks(*given[: 4 if given[-2] else 3]),
    "_step": lambda *given: _of_chunks(*given[:3]),
    "_first_bad": lambda rows, *_: [rows[:, :2]],
}
told: set[tuple[str, int]] = set()
"""Kernels, and what alignment they were launched with."""


def check_alignment() -> None:
    assert (alignment(), alignment(0, 16, 4096), alignment(32, 8)) == (16, 16, 1)
    use_kernels("launched")
    for shapes, expected in (([(16, 32), (48,)], 16), ([(16, 32), (10,)], 1)):
        parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
        optimizer = VirtualWorkers(parameters, 2, DistributedLion)
        for sign in (1.0, -1.0):
            for parameter in parameters:
                parameter.grad = torch.full_like(parameter, sign)
            optimizer.next_worker()
        optimizer.step()
        plan = optimizer.members[0].plan
        [tables] = [plan.views._tables_of(bucket) for bucket in plan.buckets]
        assert [launch[2] for launch in tables.packing] == [launch[1] for launch in tables.applying] == [expected]
    moved = torch.ones(513)[1:]
    assert plan.views._addresses([moved, None], [moved.dtype] * 2).align == alignment(moved.data_ptr())


def mixed_model(device: str) -> list[torch.nn.Parameter]:
    """Of several dtypes and orders in memory, in several buckets."""
    source = torch.Generator().manual_seed(3)
    drawn = [torch.randn(shape, generator=source) for shape in ((5, 7), (130, 140), (8, 4, 3, 5), (0,), (40, 131))]
    drawn[1] = drawn[1].bfloat16()
    drawn[2] = drawn[2].to(memory_format=torch.channels_last)
    drawn.append(torch.randn(33, generator=source).half())
    drawn.append(torch.randn(120, 130, generator=source).t())
    drawn.append(torch.randn(1 + 33 * 16, generator=source)[1:])  # at an odd address
    return [torch.nn.Parameter(one.to(device) if device != "cpu" else one) for one in drawn]


def mixed_gradient(parameter: Tensor, index: int, rank: int, step: int) -> Tensor | None:
    """Dense, transposed, expanded, every second element of another, or none."""
    source = torch.Generator().manual_seed(1000 * step + 10 * rank + index)
    if index == 4 and (step == 1 or rank == 0):
        return None
    if index == 6 and step == 0:
        return torch.randn(1, generator=source).expand(parameter.shape)
    if index == 6 or index == 1:
        return torch.randn((*parameter.shape, 2), generator=source).to(parameter.dtype)[..., 0]
    return (
        torch.randn(parameter.shape[::-1], generator=source).to(parameter.dtype).permute(*range(parameter.dim())[::-1])
    )


def train_mixed(kernels: str, method: str, device: str, workers: int, **options: Any) -> list[Tensor]:
    use_kernels(kernels)
    parameters = mixed_model(device)
    hidden = [i for i, parameter in enumerate(parameters) if parameter.dim() > 1]
    rest = [parameter for i, parameter in enumerate(parameters) if i not in hidden]
    made: Any = [{"params": [parameters[i] for i in hidden]}, {"params": rest, "lr": 2e-3, "weight_decay": 0.2}]
    for group, orthogonal in zip(made, () if method == "dlion" else (True, False), strict=False):
        group["orthogonal"] = orthogonal
    kind = METHODS[method]
    optimizer: Any = kind(made, **options) if workers == 1 else VirtualWorkers(made, workers, kind, **options)
    for step in range(STEPS):
        if step == 2:
            parameters[1].data = parameters[1].data.float()
            parameters[2].data = parameters[2].data.clone(memory_format=torch.contiguous_format)
        for rank in range(workers):
            for index, parameter in enumerate(parameters):
                gradient = mixed_gradient(parameter, index, rank, step)
                parameter.grad = None if gradient is None else gradient.to(device)
            if workers > 1:
                optimizer.next_worker()
        optimizer.step()
        optimizer.zero_grad()
    assert len(optimizer.members[0].plan.buckets) > (1 if method == "averages" else 2)
    states = [held for member in optimizer.members for state in member.state.values() for held in state.values()]
    return [*(parameter.detach() for parameter in parameters), *states]


def check_mixed(method: str, device: str = "cpu") -> None:
    layout.MAX_BUCKET_BLOCKS = layout.MIN_BUCKET_BLOCKS = 18
    layout.GPU_BUCKETS = 1
    cases: list[tuple[int, dict[str, Any]]] = [(1, {}), (2, {"norm_gradients": True}), (2, {"aggregation": "avg"})]
    for workers, options in cases:
        ours, eager = (train_mixed(kernels, method, device, workers, **options) for kernels in ("launched", "eager"))
        assert all(itertools.starmap(torch.equal, zip(ours, eager, strict=True))), (workers, options)


def check_all_bad() -> None:
    """From the first step on, and with the same bits, all workers have bad gradients."""
    for kernels in ("launched", "eager"):
        use_kernels(kernels)
        for good_steps in (0, 1):
            parameter = torch.nn.Parameter(torch.ones(50))
            optimizer = VirtualWorkers([parameter], 2, DistributedLion)
            for step in range(good_steps + 1):
                for rank in range(2):
                    parameter.grad = torch.full((50,), 1.0 + rank if step < good_steps else torch.nan)
                    optimizer.next_worker()
                if step < good_steps:
                    optimizer.step()
            with pytest.raises(FloatingPointError, match="rank 0: the gradient of parameter 0"):
                optimizer.step()
            assert all(state["momentum"].isfinite().all() for m in optimizer.members for state in m.state.values())


def early(rank: int, cases: list[overlap.Case]) -> list[tuple[str, bool, int]]:
    use_kernels("launched")
    sent = overlap.small_buckets()
    begin, launch, one_at_a_time = EarlyVotes._start, gpu._launch, Lock()

    def as_on_a_gpu(self: EarlyVotes) -> None:
        self._headers_last = True
        begin(self)

    def interpreted(*arguments: Any, **options: Any) -> None:
        with one_at_a_time:  # the interpreter is not for several threads
            launch(*arguments, **options)

    EarlyVotes._start, gpu._launch = as_on_a_gpu, interpreted  # type: ignore[method-assign]
    return overlap.both_ways(partial(overlap.train, rank), cases, sent)


def check_early(method: str) -> None:
    cases: dict[str, list[overlap.Case]] = {
        "dlion": [
            (overlap.lion, overlap.bad, 1, {"aggregation": "avg"}),
            (overlap.signum, overlap.replaced, 2, {"exchange": "sharded"}),
        ],
        "dmuon": [(overlap.muon, overlap.infinite, 1, {"tie": "zero"})],
        "averages": [(overlap.muon_and_adamw, overlap.infinite, 1, {})],
    }
    for rank in run_workers(early, 2, cases[method], timeout=280):
        assert all(same and early > 10 for _, same, early in rank), rank


if __name__ == "__main__":
    if sys.argv[1] == "counts":
        gpu.try_out(torch.device("cpu"))
        check_counts()
        check_dither()
        check_voted()
        check_norms()
        check_what_kernels_are_told()
        check_first_bad()
        assert told == {("_first_bad", 1), ("_first_bad", 16)}
        check_alignment()
        check_all_bad()
    elif sys.argv[1] == "early":
        check_early(sys.argv[2])
    elif sys.argv[1] == "mixed":
        check_what_kernels_are_told()
        check_mixed(sys.argv[2])
        assert told >= {(name, align) for name in ("_vote", "_apply") for align in (1, 16)}, told
    else:
        method, workers = sys.argv[1], int(sys.argv[2])
        for case in CASES:
            ours, eager = (train(kernels, method, workers, *case) for kernels in ("launched", "eager"))
            assert all(itertools.starmap(torch.equal, zip(ours, eager, strict=True))), case
