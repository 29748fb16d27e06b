"""A rank that dies under the Trainer: the others say which."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from tests.faults.victims import CAN_NAME, LOST, check_survivors, die
from tests.harness import run_to_their_ends
from tests.trainer import tiny


class Dies(TrainerCallback):
    def __init__(self, event: str) -> None:
        setattr(self, event, self.die)

    def die(self, _: Any, state: Any, *rest: Any, **more: Any) -> None:
        if state.global_step >= 2:
            die()


def train_until(rank: int, folder: str, victim: int, event: str, options: dict[str, Any]) -> None:
    trainer = tiny.trainer(rank, folder, max_steps=8, **options)
    if rank == victim:
        trainer.add_callback(Dies(event))
    trainer.train()


@pytest.mark.parametrize(
    ("victim", "event", "options", "failed"),
    [
        (2, "on_pre_optimizer_step", {"logging_steps": 2}, "an all-"),
        (0, "on_step_end", {"logging_steps": 100, "eval_strategy": "steps", "eval_steps": 2}, "training of 3 ranks"),
    ],
)
def test_the_trainer_names_the_lost_rank(
    victim: int, event: str, options: dict[str, Any], failed: str, tmp_path: Path
) -> None:
    """In an evaluation, it is a gather of the Trainer that fails."""
    outcomes = run_to_their_ends(train_until, 3, str(tmp_path), victim, event, options, timeout=100)
    check_survivors(outcomes, victim)
    for outcome in outcomes[:victim] + outcomes[victim + 1 :]:
        assert f"{'did not answer: ' if CAN_NAME else LOST}{failed}" in str(outcome.error)


TRAIN = """
import os, sys
from pathlib import Path
from transformers import TrainerCallback
from hf_dlion import DLionTrainer
from tests.trainer import tiny

class Shows(TrainerCallback):
    def on_step_end(self, args, state, *rest, **more):
        if state.global_step == 2:
            Path(sys.argv[1], os.environ["RANK"]).write_text(str(os.getpid()))

arguments = tiny.arguments(sys.argv[1], max_steps=1_000_000, logging_steps=1000)
DLionTrainer(model=tiny.model(), args=arguments, train_dataset=tiny.rows(), callbacks=[Shows()]).train()
"""


def test_all_end_at_once_when_they_are_told_to(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with log.open("w") as errors:
        launcher = subprocess.Popen([*command, str(tmp_path)], env=environment, stderr=errors)
    try:
        files = [tmp_path / "0", tmp_path / "1"]
        end = time.monotonic() + 120
        while not all(file.exists() and file.read_text() for file in files):
            assert launcher.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        workers = [int(file.read_text()) for file in files]
        for worker in workers:
            os.kill(worker, signal.SIGTERM)
        assert launcher.wait(timeout=60) == 1
    finally:
        launcher.terminate()  # and with it its workers, where the test failed
        launcher.wait(60)
    assert "Signal 15 (SIGTERM)" in log.read_text()
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)
