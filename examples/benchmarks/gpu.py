"""What a step costs its worker on a GPU, without the network: against fused AdamW, and against a copy.

    python -m examples.benchmarks.gpu --output model_cards/gpu

The parameters are those of GPT-2 of 124 M, 355 M and 1.5 B, in float32 and in bfloat16. Of `dlion_mavo`, the check of
the gradients, the vote, a worker's share of the count, and the update are timed one by one, with the decision of 4
workers; once with the gaps in which the GPU waits for the host, once their kernels alone, by the profiler. `alone` is a
whole `step()` of one worker, by the clock. Memory is what a step allocates at its peak. Writes `results.json`, with
every time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hf_dlion import DistributedLion
from hf_dlion.optim.bad_gradients import first_bad_gradient
from hf_dlion.wire.exchange import Decision
from hf_dlion.wire.local import LocalGroup, LocalWorker

from .machine import machine
from .shapes import gpt2_shapes

WORKERS = 4
WARMUP, REPEATS = 3, 15
SIZES = {
    "124M": gpt2_shapes(768, 12, 50257),
    "355M": gpt2_shapes(1024, 24, 50257),
    "1.5B": gpt2_shapes(1600, 48, 50257),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.randn(shape, dtype=dtype, device="cuda").mul_(0.02)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    return made


def milliseconds(work: Callable[[], Any]) -> list[float]:
    """Of the GPU, for each repetition."""
    for _ in range(WARMUP):
        work()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(REPEATS)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def milliseconds_of_steps(optimizer: torch.optim.Optimizer) -> list[float]:
    """By the clock, of steps that have ended on the GPU."""
    found = []
    for _ in range(WARMUP + REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        optimizer.step()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - start))
    return found[WARMUP:]


def milliseconds_of_kernels(work: Callable[[], Any]) -> float:
    """Of the GPU, for one repetition, without the gaps in which it waits for the host."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(one.device_time_total for one in profiler.key_averages()) / 1e3


def copy_rate() -> float:
    """Bytes read and written a second by a large copy."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (statistics.median(milliseconds(lambda: target.copy_(source))) / 1e3)


class Parts:
    """The local work of a step of one of `WORKERS`, taken apart.

    Args:
        held: the parameters, with their gradients.
    """

    def __init__(self, held: list[torch.nn.Parameter]) -> None:
        self.optimizer = DistributedLion(held, lr=1e-5, process_group=LocalWorker(LocalGroup(WORKERS), 0))
        self.optimizer.make_state()
        plan = self.optimizer._current_plan()
        assert plan is self.optimizer.plan
        self.plan = plan
        self.views = plan.views
        self.views.follow(held, [self.optimizer.state[parameter] for parameter in held])
        self.gradients = self.views.flatten([parameter.grad for parameter in held])
        self.hypers = self.optimizer._hypers(plan)
        self.zero_votes = torch.arange(32, device="cuda") % 2 == 0
        words = [torch.randint(-(2**31), 2**31, (bucket.blocks * 32,), device="cuda").int() for bucket in plan.buckets]
        self.received = [list(of_one[: len(of_one) // WORKERS * WORKERS].view(WORKERS, -1)) for of_one in words]
        self.planes = [(of_one, ~of_one) for of_one in words]  # of a vote with ties

    def check(self) -> int:
        return first_bad_gradient(self.gradients)

    def vote(self) -> None:
        given = self.views.given(self.gradients, None)
        for bucket in self.plan.buckets:
            self.views.pack(bucket, given, self.hypers, self.zero_votes)

    def count(self) -> None:
        assert self.plan.exchange is not None
        for votes in self.received:
            own = len(votes[0])
            self.plan.exchange._count(votes, "zero", 0, range(0, own, own // 8192 | 1))

    def apply(self) -> None:
        for bucket, planes in zip(self.plan.buckets, self.planes, strict=True):
            self.views.apply(bucket, Decision(planes, 2), self.hypers, 1, ())


def measure(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds by what is done; bytes that each part reads and writes; memory."""
    held = parameters(shapes, dtype)
    size, width = sum(parameter.numel() for parameter in held), held[0].element_size()
    adamw = torch.optim.AdamW(held, lr=1e-6, fused=True)
    times = {"adamw_fused": milliseconds(adamw.step), "adamw_fused alone": milliseconds_of_steps(adamw)}
    kernels = {"adamw_fused": milliseconds_of_kernels(adamw.step)}
    del adamw
    parts = Parts(held)
    bytes_moved = {
        "check": size * width,
        "vote": size * (width + 8 + 1 / 8),
        "count": size / 32 * 4 * (1 + 2 / WORKERS),
        "apply": size * (2 * width + 2 / 8),
    }
    for name in bytes_moved:
        times[name] = milliseconds(getattr(parts, name))
        kernels[name] = milliseconds_of_kernels(getattr(parts, name))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    parts.vote()
    parts.apply()
    memory = (torch.cuda.max_memory_allocated() - before) / 2**20
    del parts
    times["dlion alone"] = milliseconds_of_steps(DistributedLion(held, lr=1e-6))
    return {
        "parameters": size,
        "milliseconds": times,
        "milliseconds_of_kernels": kernels,
        "bytes": bytes_moved,
        "mebibytes_at_peak": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="examples.benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES), help="of the models")
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="folder for results.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use, and this measures one.")
    rate = copy_rate()
    results: dict[str, Any] = {
        "machine": machine() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda},
        "workers": WORKERS,
        "copied_bytes_a_second": rate,
        "cases": {},
    }
    print(f"{results['machine']['gpu']}: a copy moves {rate / 1e12:.2f} TB/s")
    for name in args.sizes:
        for dtype_name, dtype in DTYPES.items():
            case = results["cases"][f"{name}, {dtype_name}"] = measure(SIZES[name], dtype)
            torch.cuda.empty_cache()
            medians = {key: statistics.median(times) for key, times in case["milliseconds"].items()}
            local, of_kernels = sum(medians[part] for part in case["bytes"]), case["milliseconds_of_kernels"]
            share = sum(of_kernels[part] for part in case["bytes"]) / of_kernels["adamw_fused"]
            shares = ", ".join(
                f"{part} {medians[part]:.3f} ({moved / (medians[part] / 1e3) / rate:.0%})"
                for part, moved in case["bytes"].items()
            )
            print(
                f"{name}, {dtype_name}: {local:.3f} ms, {local / medians['adamw_fused']:.2f} times fused AdamW "
                f"({medians['adamw_fused']:.3f}), {share:.2f} of kernels alone; ms and share of a copy's rate: "
                f"{shares}; one worker alone {medians['dlion alone']:.3f} ms by the clock, AdamW "
                f"{medians['adamw_fused alone']:.3f}; {case['mebibytes_at_peak']:.1f} MiB at the peak",
                flush=True,
            )
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
