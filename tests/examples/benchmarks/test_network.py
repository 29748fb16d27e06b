"""The benchmark script, and with it the ledger against the interface's own counter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.links import NEEDS_ROOT, namespaces_work

ROOT = Path(__file__).parents[3]
# 3.3 million parameters: enough to make headers small, too few to be compiled.
SIZE = ["--hidden", "128", "--layers", "6", "--steps", "6", "--seconds", "20"]


def run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    own = ["--output", str(folder), "--timeout", "60", *options]
    command = [sys.executable, "-m", "examples.benchmarks.network", *SIZE, *own]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)


@pytest.mark.skipif(not namespaces_work(), reason=NEEDS_ROOT)
@pytest.mark.parametrize(
    ("workers", "bits"), [(4, {"dlion_mavo": 2.25, "dlion_avg": 3.0}), (2, {"dlion_mavo": 1.0, "dlion_avg": 1.0})]
)
def test_the_interface_counts_what_the_ledger_does(workers: int, bits: dict[str, float], tmp_path: Path) -> None:
    done = run(tmp_path, "--workers", str(workers), "--rates", "1gbit", "--methods", *bits)
    assert done.returncode == 0, done.stderr
    for result in json.loads((tmp_path / "results.json").read_text())["results"]:
        predicted = bits[result["method"]]
        assert predicted <= result["ledger_bits_per_parameter"] <= 1.005 * predicted
        assert predicted <= result["interface_bits_per_parameter"] <= 1.03 * predicted
    assert (tmp_path / "step_time.png").stat().st_size > 10_000


def test_loopback_compares_with_ddp(tmp_path: Path) -> None:
    done = run(tmp_path, "--workers", "2", "--loopback", "--methods", "dlion_mavo", "local_16", "ddp_fp32", "ddp_fp16")
    assert done.returncode == 0, done.stderr
    assert "| unlimited | dlion_mavo |" in done.stdout
    results = {result["method"]: result for result in json.loads((tmp_path / "results.json").read_text())["results"]}
    assert 1.125 / 16 <= results["local_16"]["ledger_bits_per_parameter"] <= 1.005 * 1.125 / 16


def test_whole_steps(tmp_path: Path) -> None:
    methods = ["computing", "dmuon_three_steps", "dmuon_averages", "dmuon_avg", "gradient_votes"]
    small = ["--hidden", "64", "--layers", "1", "--vocab", "128", "--tokens", "128", "--steps", "3"]
    done = run(tmp_path, "--workers", "2", "--loopback", *small, "--methods", *methods)
    assert done.returncode == 0, done.stderr
    results = {result["method"]: result for result in json.loads((tmp_path / "results.json").read_text())["results"]}
    bits = {method: result["ledger_bits_per_parameter"] for method, result in results.items()}
    assert bits.pop("computing") is None
    assert 10 < bits.pop("dmuon_averages") < 32
    assert all(1 <= sent < 1.2 for sent in bits.values()), bits


def test_an_unknown_rate_says_what_is_known(tmp_path: Path) -> None:
    done = run(tmp_path, "--rates", "fast")
    assert done.returncode == 1
    assert "unknown rate 'fast': give a number and kbit, mbit or gbit, or unlimited" in done.stderr
