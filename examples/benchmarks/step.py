"""What a step costs its worker: processor time against fused AdamW, and memory. Two workers over loopback.

    python -m examples.benchmarks.step --output model_cards/step

Each worker has one thread and the parameters of a GPT-2, 9.2 M of them, with gradients of its own. The two optimizers
take turns, each on parameters of its own, and the processor time of a `step()` is that of the whole process, with the
threads that send and receive. Memory is what a step adds to the resident set at its peak (Linux only), for these
parameters and for one tensor of 100 M. Writes `results.json`, with every time.
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

from hf_dlion import DistributedLion

from .machine import machine
from .shapes import gpt2_shapes

WARMUP_STEPS = 3


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter)
    return made


def processor_times(shapes: list[tuple[int, ...]], steps: int) -> dict[str, list[float]]:
    """Seconds of processor time of each step, by optimizer."""
    optimizers = {
        "adamw_fused": torch.optim.AdamW(parameters(shapes), fused=True),
        "dlion_mavo": DistributedLion(parameters(shapes)),
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for step in range(WARMUP_STEPS + steps):
        for name, optimizer in optimizers.items():
            dist.barrier()
            start = time.process_time()
            optimizer.step()
            if step >= WARMUP_STEPS:
                times[name].append(time.process_time() - start)
    return times


def peak_mebibytes(shapes: list[tuple[int, ...]]) -> float | None:
    """What the second step adds to the resident set at its peak; None where the kernel does not tell."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    optimizer = DistributedLion(parameters(shapes))
    optimizer.step()
    reset.write_text("5")
    resident = kibibytes(status, "VmRSS")
    optimizer.step()
    return (kibibytes(status, "VmHWM") - resident) / 1024


def kibibytes(status: Path, key: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(key))


def work(rank: int, folder: str, workers: int, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
    shapes = gpt2_shapes(256, 6, 16384)
    found: dict[str, Any] = {
        "parameters": sum(torch.Size(shape).numel() for shape in shapes),
        "processor_seconds": processor_times(shapes, steps),
        "peak_mebibytes": {"9.2 M": peak_mebibytes(shapes), "100 M": peak_mebibytes([(100_000_000,)])},
    }
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
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(options.workers)]
    report = {
        "command": f"python -m examples.benchmarks.step --workers {options.workers} --steps {options.steps}",
        "machine": machine(),
        "ranks": ranks,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    Path(options.output, "results.json").write_text(json.dumps(report, indent=1) + "\n")
    for rank, found in enumerate(ranks):
        times = found["processor_seconds"]
        ratios = [b / a for a, b in zip(times["adamw_fused"], times["dlion_mavo"], strict=True)]
        medians = {name: f"{1e3 * statistics.median(seconds):.1f} ms" for name, seconds in times.items()}
        quarters = statistics.quantiles(ratios, n=4)
        print(
            f"rank {rank}: {medians}, ratio {quarters[1]:.2f} (quartiles {quarters[0]:.2f} to {quarters[2]:.2f}); "
            f"peak memory of a step, MiB: {found['peak_mebibytes']}"
        )


if __name__ == "__main__":
    main()
