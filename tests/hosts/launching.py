"""Scripts over two processes on the CPU, and what their Trainer logged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/launch/cpu_2.yaml"]


def run(*command: str | Path, **variables: str) -> str:
    """Run a command from the root of the repository; what it printed."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)} | variables
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done.stdout


def check_that_two_voted(folder: Path, steps: int) -> None:
    """By the log of the Trainer that wrote into the folder, logging each step."""
    state = next(iter(sorted(folder.rglob("trainer_state.json"))))
    sent = [entry["bits_sent_per_param"] for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    assert len(sent) == steps
    assert all(1 <= bits < 8 for bits in sent)  # 0 with one process; an adapter has few parameters to a header
