"""Victims, and what those who are left must say of them. Without transformers, which workers take long to import."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch.distributed as dist

from tests.harness import Outcome

LOST = "hf_dlion.wire.liveness.WorkerLostError: "
CAN_NAME = hasattr(dist.Store, "clone")
needs_names = pytest.mark.skipif(not CAN_NAME, reason="this torch cannot name a rank that is lost")


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def check_survivors(outcomes: list[Outcome], victim: int) -> None:
    """All but the victim say that it was this one, or that torch cannot name it."""
    named = f"rank {victim} did not answer: " if CAN_NAME else ""
    advice = (
        "see its log."
        if CAN_NAME
        else "cannot name the rank that did not answer, as newer ones do: see the logs of all."
    )
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert outcome.exit_code == -signal.SIGKILL
            continue
        assert f"{LOST}{named}" in str(outcome.error), f"rank {rank}: {outcome.error}"
        assert f"{advice} `torchrun --max-restarts`" in str(outcome.error)
        assert "The backend said: " in str(outcome.error)
        assert outcome.exit_code == 1
