"""`python -m` of a module in examples, without a process of its own, which would import torch each time."""

from __future__ import annotations

import io
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).parents[2]


def run_module(module: str, *words: str) -> subprocess.CompletedProcess[str]:
    """What the module with these arguments prints, and its exit code."""
    output, errors, code = io.StringIO(), io.StringIO(), 0
    with patch.object(sys, "argv", [module, *words]), redirect_stdout(output), redirect_stderr(errors):
        try:
            runpy.run_module(module, run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                errors.write(f"{end.code}\n")
    return subprocess.CompletedProcess(words, code, output.getvalue(), errors.getvalue())
