"""What a step costs its worker: processor time against fused AdamW, and memory. Two workers over loopback.

    python -m examples.benchmarks.step --output model_cards/step

Each worker has one thread, and gradients of its own for the parameters of a GPT-2 (9.2 M), or for one tensor of 16.8 M
or 100 M. Optimizers take turns, each on parameters of its own: fused AdamW, `dlion_mavo`, and the same as in a Trainer,
which finds the norm of the gradients, so that they need not be read to see whether they are finite. The processor time
of a `step()` is that of the whole process, with the threads that send and receive; and that of the calling thread
alone, which is the local work. Memory is what a step adds to the resident set at its peak (Linux only). Writes
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

from hf_dlion import DistributedLion

from .machine import machine
from .shapes import gpt2_shapes

WARMUP_STEPS = 3
SIZES: dict[str, list[tuple[int, ...]]] = {
    "9.2 M": gpt2_shapes(256, 6, 16384),
    "16.8 M": [(1 << 24,)],
    "100 M": [(100_000_000,)],
}
CLOCKS = {"process": time.process_time, "calling_thread": time.thread_time}


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    made = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
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
                in_trainer.agreement.note_norm(gradients, torch.ones(()))
            dist.barrier()
            starts = {clock: read() for clock, read in CLOCKS.items()}
            optimizer.step()
            for clock, read in CLOCKS.items():
                if step >= WARMUP_STEPS:
                    times[clock][name].append(read() - starts[clock])
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
    found: dict[str, Any] = {
        size: {"processor_seconds": processor_times(shapes, steps), "peak_mebibytes": peak_mebibytes(shapes)}
        for size, shapes in SIZES.items()
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
    for size in SIZES:
        for rank, found in enumerate(ranks):
            print(f"{size}, rank {rank}: {describe(found[size])}")


def describe(found: dict[str, Any]) -> str:
    """One size on one rank, for people: the median ratio to fused AdamW over pairs of steps, and the memory."""
    words = []
    for clock, times in found["processor_seconds"].items():
        for name in ("dlion_mavo", "of_known_norm"):
            pairs = zip(times["adamw_fused"], times[name], strict=True)
            lower, median, upper = statistics.quantiles([own / adamw for adamw, own in pairs], n=4)
            words.append(f"{clock} {name} {median:.2f} times fused AdamW (quartiles {lower:.2f} to {upper:.2f})")
    peak = found["peak_mebibytes"]
    return ", ".join([*words, "peak memory unknown" if peak is None else f"peak memory {peak:.1f} MiB"])


if __name__ == "__main__":
    main()
