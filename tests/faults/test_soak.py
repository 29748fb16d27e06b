"""Half an hour of training with three workers, under torchrun, and a fault every 20 to 60 seconds: `make soak`.

As root, the workers are in network namespaces, and their links are cut too.

What it did is written as JSON to SOAK_REPORT (soak_report.json); SOAK_MINUTES and SOAK_SEED are its length and seed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dlion.checkpoint.manifest import write_whole
from tests.links import Links, links, namespaces_work

WORKERS = 3
TIME_LIMIT = 20  # seconds, of a collective
HANG = 240  # seconds without a step: longer than a start, a time limit and torchrun's patience with a frozen process
ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("soak_training.py")
RECORDS, PROGRESS, LAST_STEP = "soak_rank{}.jsonl", "soak_progress", "soak_last_step"
SAVE_STEPS = 20
BETWEEN = 20, 60  # seconds from fault to fault
UNLIMITED = 10**6  # steps
CUT = "cut link"
CUT_SECONDS = 30  # longer than the time limit: it is noticed, and the workers are started again while it lasts
FAULTS = ["kill", "kill in an exchange", "kill while saving", "terminate all", "freeze", "no space"]
# torchrun starts this for each worker.
IN_NAMESPACE = 'exec ip netns exec "$1-$LOCAL_RANK" env MASTER_ADDR="$2" GLOO_SOCKET_IFNAME=eth0 "${@:3}"'


def command(folder: Path, steps: int, seed: int, network: Links | None, options: Sequence[str]) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    launch += ["--max-restarts", "1000", "--monitor-interval", "0.5"]
    script = ["--no-python", sys.executable, str(SCRIPT)]
    if network is not None:
        prefix = network.namespaces[0].removesuffix("-0")
        script = ["--no-python", "bash", "-c", IN_NAMESPACE, "bash", prefix, network.addresses[0], *script[1:]]
    return [*launch, *script, *arguments(folder, steps, seed), *options]


def arguments(folder: Path, steps: int, seed: int) -> list[str]:
    settings = {
        "optim": "dlion_mavo",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "block_size": 64,
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "seed": seed,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "save_total_limit": 3,
        "eval_strategy": "steps",
        "eval_steps": steps,
        "eval_on_start": "false",
        "max_eval_blocks": 64,
        "logging_steps": 100,
        "ddp_timeout": TIME_LIMIT,
        "check_replicas_steps": 1,
        "resume_from_checkpoint": "auto",
        "disable_tqdm": "true",
        "report_to": "none",
        "cache_dir": folder.parent / "cache",
        "output_dir": folder,
    }
    return ["--use_cpu", *(f"--{name}={value}" for name, value in settings.items())]


def environment() -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}",
        # Else workers meet the addresses of those before the restart in the agent's store (pytorch/pytorch#135712).
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }


@contextlib.contextmanager
def training(
    folder: Path, steps: int, seed: int, network: Links | None = None, options: Sequence[str] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    folder.mkdir(parents=True)
    with (folder / "log.txt").open("wb") as log:
        # Through a pipe: a worker without space can still say so.
        writer = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log, start_new_session=True)
        process = subprocess.Popen(
            command(folder, steps, seed, network, options),
            stdout=writer.stdin,
            stderr=subprocess.STDOUT,
            env=environment(),
            start_new_session=True,
        )
        try:
            yield process
        finally:
            for pid in [*workers_of(process.pid).values(), process.pid]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            writer.communicate()


def workers_of(agent: int) -> dict[int, int]:
    """The process of each rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, KeyError):
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == agent:
                pairs = (pair.partition(b"=") for pair in (folder / "environ").read_bytes().split(b"\0"))
                found[int({key: value for key, _, value in pairs}[b"RANK"])] = int(folder.name)
    return found


def progress(folder: Path) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((folder / PROGRESS).read_text().split()[0])
    return 0


def inject(fault: str, ranks: dict[int, int], draw: random.Random) -> list[int]:
    """Returns the ranks that it struck."""
    struck = sorted(ranks) if fault == "terminate all" else [draw.choice(sorted(ranks))]
    for rank in struck:
        with contextlib.suppress(ProcessLookupError):
            if fault == "no space":  # as if the disk were full: a file can have no more than that
                hard = resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE)[1]
                resource.prlimit(ranks[rank], resource.RLIMIT_FSIZE, (40_000, hard))
            else:
                number = {
                    "kill": signal.SIGKILL,
                    "kill in an exchange": signal.SIGUSR1,
                    "kill while saving": signal.SIGUSR2,
                    "terminate all": signal.SIGTERM,
                    "freeze": signal.SIGSTOP,
                }[fault]
                os.kill(ranks[rank], number)
    return struck


def undisturbed(folder: Path, steps: int, seed: int, options: Sequence[str] = ()) -> dict[str, Any]:
    began = time.monotonic()
    with training(folder, steps, seed, options=options) as process:
        assert process.wait(timeout=7200) == 0, (folder / "log.txt").read_text()[-3000:]
    return {"seed": seed, "seconds": round(time.monotonic() - began), **end_of(folder)}


def end_of(folder: Path) -> dict[str, Any]:
    last = [json.loads((folder / RECORDS.format(rank)).read_text().splitlines()[-1]) for rank in range(WORKERS)]
    results = json.loads((folder / "results.json").read_text())
    return {
        "steps": results["steps"],
        "first_loss": next(entry["loss"] for entry in results["log_history"] if "loss" in entry),
        "validation_loss": results["validation_loss_last"],
        "checksums": [entry["checksum"] for entry in last],
    }


def soak(folder: Path, minutes: float, seed: int, network: Links | None) -> dict[str, Any]:
    draw = random.Random(seed)
    kinds = [*FAULTS, *([CUT] if network else [])]
    began, faults, waiting = time.monotonic(), [], []
    last, since = 0, began
    due: float | None = None
    cut: tuple[float, int] | None = None
    with training(folder, UNLIMITED, seed, network) as process:
        while process.poll() is None:
            time.sleep(0.2)
            now, step = time.monotonic(), progress(folder)
            moved = step != last
            if moved:
                last, since = step, now
                due = now + draw.uniform(*BETWEEN) if due is None else due
            assert now - since < HANG, f"no step for {HANG} s after {faults[-1:]}"
            if network is not None and cut is not None and now > cut[0] + CUT_SECONDS:
                network.set(cut[1], "up")
                cut = None
            if now - began > 60 * minutes:
                if not (folder / LAST_STEP).exists():
                    # Far enough on that what waits for the next save has struck, and been resumed from.
                    end = (step // SAVE_STEPS + 4) * SAVE_STEPS
                    write_whole(folder / LAST_STEP, lambda path, end=end: path.write_text(str(end)))  # type: ignore[misc]
                continue
            ranks = workers_of(process.pid)
            # Where it takes longer than that until training moves again, the next fault waits for it.
            if due is not None and now >= due and moved and len(ranks) == WORKERS and cut is None:
                waiting = waiting or draw.sample(kinds, len(kinds))
                fault = waiting.pop()
                if network is not None and fault == CUT:
                    cut = now, draw.randrange(WORKERS)
                    network.set(cut[1], "down")
                struck = [cut[1]] if cut else inject(fault, ranks, draw)
                faults.append({"second": round(now - began, 1), "step": step, "fault": fault, "ranks": struck})
                due = now + draw.uniform(*BETWEEN)
        assert process.returncode == 0, (folder / "log.txt").read_text()[-3000:]
    texts = [(folder / RECORDS.format(rank)).read_text() for rank in range(WORKERS)]
    starts = [[record for line in text.splitlines() if "began" in (record := json.loads(line))] for text in texts]
    return {
        "seed": seed,
        "seconds": round(time.monotonic() - began),
        "links_could_be_cut": network is not None,
        "faults": faults,
        "faults_by_kind": Counter(fault["fault"] for fault in faults),
        "longest_without_a_fault": round(max(b["second"] - a["second"] for a, b in pairwise(faults)), 1),
        "resumed_from": [start["resumed_from"] and Path(start["resumed_from"]).name for start in starts[0]],
        "resumed_from_incomplete": sum(start["incomplete"] is not None for of_rank in starts for start in of_rank),
        **end_of(folder),
    }


@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    minutes, seed = float(os.environ.get("SOAK_MINUTES", "30")), int(os.environ.get("SOAK_SEED", "1"))
    with links(WORKERS) if namespaces_work() else contextlib.nullcontext() as network:
        disturbed = soak(tmp_path / "soak", minutes, seed, network)
    same, other = (undisturbed(tmp_path / f"undisturbed_{one}", disturbed["steps"], one) for one in (seed, seed + 1))
    report = {
        "command": f"SOAK_MINUTES={minutes:g} SOAK_SEED={seed} make soak",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "workers": WORKERS,
        "time_limit_of_collectives": TIME_LIMIT,
        "disturbed": disturbed,
        "undisturbed": [same, other],
    }
    Path(os.environ.get("SOAK_REPORT", "soak_report.json")).write_text(json.dumps(report, indent=1) + "\n")
    kinds = [*FAULTS, *([CUT] if network else [])]
    assert set(disturbed["faults_by_kind"]) == set(kinds) or len(disturbed["faults"]) < len(kinds)
    assert disturbed["resumed_from_incomplete"] == 0
    assert len(set(disturbed["checksums"])) == 1, "the ranks' parameters differ"
    assert disturbed["validation_loss"] < disturbed["first_loss"]
    # More than the loss within the spread of two seeds: bit for bit the run that nothing disturbed.
    assert disturbed["checksums"] == same["checksums"]
    assert disturbed["validation_loss"] == same["validation_loss"] != other["validation_loss"]
