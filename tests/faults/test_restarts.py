"""torchrun --max-restarts goes on from the last complete checkpoint, without help."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.faults.test_soak import RECORDS, WORKERS, end_of, inject, progress, training, workers_of

STEPS = 60
SAVED = 20  # steps between checkpoints


@pytest.mark.parametrize(
    "fault",
    [
        "kill while saving",
        pytest.param("kill in an exchange", marks=pytest.mark.slow),
        pytest.param("no space", marks=pytest.mark.slow),
    ],
)
def test_goes_on_after(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with training(folder, STEPS, seed=1) as process:
        until = time.monotonic() + 400
        while progress(folder) < SAVED + 2 and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        struck = inject(fault, workers_of(process.pid), random.Random(0))
        assert process.wait(timeout=400) == 0, (folder / "log.txt").read_text()[-3000:]
    assert len(struck) == 1
    for rank in range(WORKERS):
        records = [json.loads(line) for line in (folder / RECORDS.format(rank)).read_text().splitlines()]
        first, second, last = records
        assert first["resumed_from"] is None
        assert Path(second["resumed_from"]).name == f"checkpoint-{SAVED}"
        assert second["incomplete"] is None
        assert last["step"] == STEPS
    assert len(set(end_of(folder)["checksums"])) == 1
