"""What a step costs its worker: processor time against fused AdamW, and memory. Two workers over loopback.

    python -m examples.benchmarks.step --output model_cards/step

Each worker has one thread, and gradients of its own for the parameters of a GPT-2 (9.2 M), or for one tensor of 16.8 M
or 100 M. Optimizers take turns, each on parameters of its own: fused AdamW, `dlion_mavo`, and the same as in a Trainer,
which finds the norm of the gradients, so that they need not be read to see whether they are finite. The processor time
of a `step()` is that of the whole process, with the threads that send and receive; and that of the calling thread
alone, which is the local work. Memory is what steps add to the resident set at its peak, besides the state (Linux
only). Passes are those in C over a single tensor, each against a copy of as much memory, both workers at once. Writes
`results.json`, with every time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from hf_dlion import DistributedLion, DistributedMuon
from hf_dlion.bits.native import load_dither, load_find_bad, load_passes
from hf_dlion.bits.packing import BLOCK, LANES

from .machine import machine
from .shapes import gpt2_shapes

WARMUP_STEPS = 3
SIZES: dict[str, list[tuple[int, ...]]] = {
    "9.2 M": gpt2_shapes(256, 6, 16384),
    "16.8 M": [(1 << 24,)],
    "100 M": [(100_000_000,)],
}
OF_DMUON = "dmuon, 46.7 M"
SHAPES_OF_DMUON = gpt2_shapes(512, 12, 16384)
CLOCKS = {"process": time.process_time, "calling_thread": time.thread_time}


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.ones(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def processor_times(shapes: list[tuple[int, ...]], steps: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of processor time of each step, by clock and optimizer."""
    optimizers: dict[str, Any] = {
        "adamw_fused": torch.optim.AdamW(parameters(shapes), fused=True),
        "dlion_mavo": DistributedLion(parameters(shapes)),
        "of_known_norm": DistributedLion(parameters(shapes)),
    }
    in_trainer = optimizers["of_known_norm"]
    times: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in optimizers} for clock in CLOCKS}
    for step in range(WARMUP_STEPS + steps):
        for name, optimizer in optimizers.items():
            if optimizer is in_trainer:
                gradients = [parameter.grad for parameter in in_trainer.param_groups[0]["params"]]
                in_trainer.agreement.known_finite.note_norm(gradients, torch.ones(()))
            dist.barrier()
            starts = {clock: read() for clock, read in CLOCKS.items()}
            optimizer.step()
            for clock, read in CLOCKS.items():
                if step >= WARMUP_STEPS:
                    times[clock][name].append(read() - starts[clock])
    return times


def dmuon(shapes: list[tuple[int, ...]]) -> DistributedMuon:
    """Of a GPT-2's parameters, the first two of which are its embeddings."""
    made = parameters(shapes)
    hidden = [parameter for parameter in made[2:] if parameter.dim() == 2]
    rest = made[:2] + [parameter for parameter in made[2:] if parameter.dim() < 2]
    return DistributedMuon([{"params": hidden, "orthogonal": True}, {"params": rest, "orthogonal": False}])


def peak_mebibytes(optimizer: torch.optim.Optimizer) -> float | None:
    """What two steps add to the resident set at its peak, besides the state; None where the kernel does not tell.

    The first one is counted for what its allocator keeps.
    """
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    resident = kibibytes(status, "VmRSS")
    optimizer.step()
    optimizer.step()
    state = sum(value.nbytes for held in optimizer.state.values() for value in held.values())
    return (kibibytes(status, "VmHWM") - resident) / 1024 - state / 2**20


def pass_seconds(elements: int, turns: int) -> dict[str, dict[str, Any]]:
    """Of each pass in C and of a copy: the bytes that it reads and writes a parameter, and seconds, in turns."""
    passes, dither, find_bad = load_passes(), load_dither(), load_find_bad()
    assert passes is not None
    assert dither is not None
    assert find_bad is not None
    shape = (elements // BLOCK, LANES, LANES)
    parameter, gradient, momentum = (torch.randn(shape) for _ in range(3))
    flat, parts = gradient.flatten(), [gradient.numel()]
    words, rows = torch.zeros(shape[:2], dtype=torch.int32), [slice(0, shape[0])]
    hyper, zero_votes = torch.tensor([0.9, 0.1, 0.99, 0.01, 1e-4, 0.1]), torch.arange(LANES) % 2 == 0
    seed, one = torch.ones(1, dtype=torch.int32), torch.ones(1)
    lists = [gradient], [momentum], [hyper], zero_votes, words, rows
    calls: dict[str, tuple[float, Any]] = {
        "copy": (8, lambda: parameter.copy_(gradient)),
        "check": (4, lambda: find_bad([gradient])),
        "vote": (12.125, lambda: passes.vote(*lists)),
        "early_vote": (8.125, lambda: passes.peek(*lists)),
        "momentum": (12, lambda: passes.move(flat, momentum.view(-1), hyper)),
        "update": (8.125, lambda: passes.apply([parameter], [hyper], [seed], [None], 1, [words], rows)),
        "gradient_vote": (4.125, lambda: dither.pack(flat, parts, [1], one, 0)),
        "voted_gradient": (4.125, lambda: dither.settle(flat, parts, one, 1, [words])),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(WARMUP_STEPS + turns):
        for name, (_, call) in calls.items():
            dist.barrier()
            start = time.perf_counter()
            call()
            if turn >= WARMUP_STEPS:
                seconds[name].append(time.perf_counter() - start)
    return {name: {"bytes_a_parameter": moved, "seconds": seconds[name]} for name, (moved, _) in calls.items()}


def work_for_memory(rank: int, folder: str, workers: int, size: str) -> None:
    """In processes of their own: memory that was freed before would be used again unseen."""
    begin(rank, folder, workers, size)
    peak_mebibytes(DistributedLion(parameters([(1 << 20,)])))  # so that all code is in memory
    optimizer = dmuon(SHAPES_OF_DMUON) if size == OF_DMUON else DistributedLion(parameters(SIZES[size]))
    Path(folder, f"{size}.{rank}.json").write_text(json.dumps(peak_mebibytes(optimizer)))
    dist.destroy_process_group()


def kibibytes(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))


def begin(rank: int, folder: str, workers: int, name: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store {name}", rank=rank, world_size=workers)


def work(rank: int, folder: str, workers: int, steps: int) -> None:
    begin(rank, folder, workers, "times")
    found: dict[str, Any] = {size: {"processor_seconds": processor_times(SIZES[size], steps)} for size in SIZES}
    found["16.8 M"]["passes"] = pass_seconds(1 << 24, steps)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each optimizer (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("step"), help="folder for results.json (default: step)")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if platform.system() == "Linux" else "lo0")
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (folder, options.workers, options.steps), nprocs=options.workers)
        for size in (*SIZES, OF_DMUON):
            spawn(work_for_memory, (folder, options.workers, size), nprocs=options.workers)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.workers)]
        for rank, found in enumerate(ranks):
            for size in (*SIZES, OF_DMUON):
                peak = json.loads(Path(folder, f"{size}.{rank}.json").read_text())
                found.setdefault(size, {})["peak_mebibytes"] = peak
    report = {
        "command": f"python -m examples.benchmarks.step --workers {options.workers} --steps {options.steps}",
        "machine": machine(),
        "ranks": ranks,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    Path(options.output, "results.json").write_text(json.dumps(report, indent=1) + "\n")
    for size in SIZES:
        for rank, found in enumerate(ranks):
            print(f"{size}, rank {rank}: {describe(found[size])}")
    for rank, found in enumerate(ranks):
        print(f"{OF_DMUON}, rank {rank}: {describe(found[OF_DMUON])}")


def describe(found: dict[str, Any]) -> str:
    """One size on one rank, for people: the median ratio to fused AdamW over pairs of steps, and the memory."""
    words = []
    for clock, times in found.get("processor_seconds", {}).items():
        for name in ("dlion_mavo", "of_known_norm"):
            pairs = zip(times["adamw_fused"], times[name], strict=True)
            lower, median, upper = statistics.quantiles([own / adamw for adamw, own in pairs], n=4)
            words.append(f"{clock} {name} {median:.2f} times fused AdamW (quartiles {lower:.2f} to {upper:.2f})")
    passes = found.get("passes", {})
    for name, one in passes.items():
        pairs = zip(passes["copy"]["seconds"], one["seconds"], strict=True)
        worth = one["bytes_a_parameter"] / passes["copy"]["bytes_a_parameter"]
        share = statistics.median(copy * worth / own for copy, own in pairs)
        words.append(f"{name} at {100 * share:.0f} % of the rate of a copy")
    peak = found["peak_mebibytes"]
    return ", ".join([*words, "peak memory unknown" if peak is None else f"peak memory {peak:.1f} MiB"])


if __name__ == "__main__":
    main()
