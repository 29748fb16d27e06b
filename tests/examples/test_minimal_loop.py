"""The plain loop: it learns, with two processes, and the documents show its lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "examples/minimal_loop.py"


def test_two_processes_learn() -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/launch/cpu_2.yaml"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*launch, SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    shares = [int(share) for share in re.findall(r"^epoch \d+: (\d+)%", done.stdout, re.MULTILINE)]
    assert len(shares) == 4  # one process speaks
    assert shares[-1] > 95


@pytest.mark.parametrize("document", ["README.md", "docs/integrations.md"])
def test_the_documents_show_its_lines(document: str) -> None:
    text = (ROOT / document).read_text()
    snippet = re.search(r"```python\n(accelerator = .*?)```", text, re.DOTALL)
    assert snippet is not None
    script = _in_form((ROOT / SCRIPT).read_text())
    assert [line for line in _in_form(snippet[1]) if line not in script] == []
    assert len((ROOT / SCRIPT).read_text().splitlines()) <= 50


def _in_form(code: str) -> list[str]:
    """The lines without their indentation, their numbers, and the choice of the CPU."""
    return [re.sub(r"=[\d.e-]+", "=0", line.strip().replace("cpu=True", "")) for line in code.splitlines()]
