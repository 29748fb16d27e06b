"""Victims, and what those who are left must say of them. Without transformers, which workers take long to import."""

from __future__ import annotations

import os
import signal
from typing import Any

from tests.harness import Outcome

LOST = "hf_dlion.wire.liveness.WorkerLostError: "


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def check_survivors(outcomes: list[Outcome], victim: int) -> None:
    """All but the victim say that it was this one."""
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert outcome.exit_code == -signal.SIGKILL
            continue
        assert f"{LOST}rank {victim} did not answer: " in str(outcome.error), f"rank {rank}: {outcome.error}"
        assert "see its log. `torchrun --max-restarts`" in str(outcome.error)
        assert "The backend said: " in str(outcome.error)
        assert outcome.exit_code == 1
