"""Triton's passes are bit for bit the eager ones, and compile; in its interpreter, and so without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", "3.6", reason="no Triton of 3.6 or newer is installed, whose interpreter works")


PARTS = ["counts", "mixed dlion", "mixed dmuon", "early dmuon", "dlion 2", "dmuon 3", "averages 2"]
REST = ["early dlion", "early averages", "mixed averages", "dlion 1", "dlion 3", "dmuon 1", "dmuon 2", "averages 1"]


@pytest.mark.parametrize("part", [*PARTS, *(pytest.param(part, marks=pytest.mark.slow) for part in REST)])
def test_as_the_eager_ones(part: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.launched", *part.split()],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (75, 80, 120))])
def test_kernels_compile_for_gpus_that_are_not_there(capability: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.optim.compiled", str(capability)],
        env=os.environ | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
