"""The comparison of runs: what is run, what is chosen, what is not run again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]

# Its loss is lowest at a learning rate of 0.2, and differs by seed.
SCRIPT = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for name in ("learning_rate", "seed", "shift"):
    parser.add_argument(f"--{name}", type=float)
parser.add_argument("--output_dir", type=pathlib.Path)
given = parser.parse_args()
loss = 1 + (given.learning_rate - 0.2) ** 2 + given.shift + given.seed / 1000
history = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": loss}]
found = {"validation_loss_last": loss, "bytes_sent": 10, "loss_key": "eval_loss", "log_history": history}
(given.output_dir / "results.json").write_text(json.dumps(found))
"""


def test_a_study(tmp_path: Path) -> None:
    script, output = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    rates = [0.1, 0.2, 0.4]
    study = {
        "title": "A study",
        "script": str(script),
        "seeds": [1, 2],
        "arguments": {"shift": 0.0},
        "methods": {
            "base": {"workers": 1, "learning_rates": rates},
            "worse, by a lot": {"workers": 1, "learning_rates": rates, "shift": 0.5},
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    command = [sys.executable, "examples/compare_runs.py", str(tmp_path / "study.yaml"), "--output", str(output)]

    def compare() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)

    first = compare()
    assert first.returncode == 0, first.stderr
    summary = json.loads((output / "summary.json").read_text())["methods"]
    assert summary["base"]["learning_rate"] == 0.2
    assert list(summary["base"]["search"]) == ["0.1", "0.2", "0.4"]
    assert list(summary["base"]["final"]) == ["1", "2"]
    assert (output / "curves.png").exists()
    text = (output / "README.md").read_text()
    assert "0.1: 1.011, **0.2**: 1.001, 0.4: 1.041" in text
    assert "+64.9%" in text  # exp(0.5) - 1
    assert first.stdout.count("running") == 8

    (output / "base/lr_0.1/seed_1/results.json").unlink()
    assert compare().stdout.count("running") == 1
    script.write_text("raise SystemExit(3)")
    (output / "base/lr_0.1/seed_1/results.json").unlink()
    broken = compare()
    assert broken.returncode == 1
    assert "exit code 3" in broken.stderr
