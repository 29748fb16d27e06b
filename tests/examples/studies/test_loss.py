"""Studies by loss: what is run, what is chosen, what is not run again, and workers that are processes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from studies import runs
from studies.study import Study

from ..command import ROOT, run_module

# Its loss is lowest at a learning rate of 0.2, and differs by seed.
SCRIPT = """
import argparse, json, os, pathlib
parser = argparse.ArgumentParser()
for name in ("learning_rate", "seed", "shift"):
    parser.add_argument(f"--{name}", type=float)
for name in ("optim", "weight_decay"):
    parser.add_argument(f"--{name}")
parser.add_argument("--output_dir", type=pathlib.Path)
given = parser.parse_args()
loss = 1 + (given.learning_rate - 0.2) ** 2 + given.shift + given.seed / 1000
history = [{"step": 1, "eval_loss": 2.0}, {"step": 2, "eval_loss": loss}]
found = {"bytes_sent": 10, "trainable_parameters": 10, "bytes_counted_steps": 2, "log_history": history}
found |= {"world_size": os.environ.get("WORLD_SIZE")}
(given.output_dir / "README.md").write_text("# A card")
if os.environ.get("RANK", "0") == "0":
    (given.output_dir / "results.json").write_text(json.dumps(found))
"""
# Scores a folder by its name, and puts the score into its card.
EVALUATION = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--num_fewshot", type=int)
for name in ("model", "output_dir"):
    parser.add_argument(f"--{name}", type=pathlib.Path)
for name in ("limit", "model_card"):
    parser.add_argument(f"--{name}")
parser.add_argument("--compare", nargs="+")
given = parser.parse_args()
if given.compare:
    names = [pathlib.Path(folder).name for folder in given.compare]
    (given.output_dir / f"{given.num_fewshot}shot.md").write_text(f"| scores of {', '.join(names)} |")
else:
    if given.model_card:
        with (given.model / "README.md").open("a") as card:
            card.write(f", scored with {given.num_fewshot} shots")
    found = {"tasks": {}, "average": len(str(given.model)), "limit": given.limit}
    (given.output_dir / f"{given.num_fewshot}shot.json").write_text(json.dumps(found))
"""


class Bench:
    def __init__(self, folder: Path) -> None:
        self.folder, self.output, self.script = folder, folder / "out", folder / "script.py"
        self.script.write_text(SCRIPT)
        rates = [0.1, 0.2, 0.4]
        self.study: dict[str, Any] = {
            "title": "A study",
            "script": str(self.script),
            "seeds": [1, 2],
            "tune": {"seed": 1},
            "arguments": {"shift": 0.0},
            "methods": {
                "base": {"optim": "dlion_mavo", "workers": 1, "learning_rates": rates},
                "worse, by a lot": {"optim": "dlion_avg", "workers": 1, "learning_rates": rates, "shift": 0.5},
            },
        }

    def written(self) -> Path:
        path = self.folder / "study.yaml"
        path.write_text(yaml.safe_dump(self.study, sort_keys=False))
        return path

    def compare(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run_module("examples.studies.run", str(self.written()), "--output", str(self.output), *words)

    @property
    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.output / "summary.json").read_text())
        return found

    @property
    def page(self) -> str:
        return (self.output / "README.md").read_text()


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_study(bench: Bench) -> None:
    first = bench.compare("--tune", "--publish", str(bench.folder / "published"))
    assert first.returncode == 0, first.stderr
    summary = bench.summary
    assert summary["learning_rates"]["base"] == 0.2
    assert [rate for rate, _ in summary["search"]["base"]["tried"]] == [0.1, 0.2, 0.4]
    compared = [run["seed"] for run in summary["runs"] if run["folder"] in summary["ordinary"]]
    assert compared == [1, 1, 2, 2]
    assert (bench.output / "curves.png").exists()
    assert "0.1: 1.011, **0.2: 1.001**, 0.4: 1.041" in bench.page
    assert "| base | 1 | 0.2 | 0.005 | 1.0015 (1.0010 to 1.0020); 2 |" in bench.page
    assert "+64.9%" in bench.page  # exp(0.5) - 1
    assert first.stdout.count("running") == 8
    published = sorted(str(path.relative_to(bench.folder / "published")) for path in published_files(bench))
    cards = [f"{name}/{file}" for name in ("base", "worse_by_a_lot") for file in ("README.md", "results.json")]
    assert published == sorted(["README.md", "summary.json", "curves.png", "loss_over_bits.png", *cards])

    (bench.output / "base/workers_1/lr_0.1/seed_1/results.json").unlink()
    assert bench.compare("--tune").stdout.count("running") == 1
    bench.script.write_text("raise SystemExit(3)")
    (bench.output / "base/workers_1/lr_0.1/seed_1/results.json").unlink()
    broken = bench.compare("--tune")
    assert broken.returncode == 1
    assert "exit code 3" in broken.stderr


def published_files(bench: Bench) -> list[Path]:
    return [path for path in (bench.folder / "published").rglob("*") if path.is_file()]


def test_a_grid_alone_needs_a_search(bench: Bench) -> None:
    untuned = bench.compare()
    assert untuned.returncode == 1
    assert "without --tune: base, worse, by a lot has learning_rates and no learning_rate" in untuned.stderr
    for own in bench.study["methods"].values():
        own["learning_rate"] = 0.1
    assert bench.compare().returncode == 0
    assert "none was searched" in bench.page


def test_workers_that_are_processes(bench: Bench) -> None:
    names = {"base": 1, "adamw_torch": [1, 2]}
    bench.study |= {"seeds": [1], "tune": None, "arguments": {"shift": 0.0, "weight_decay": 0.1}}
    bench.study["methods"] = {name: {"learning_rate": 0.2, "workers": workers} for name, workers in names.items()}
    bench.study["methods"]["base"]["optim"] = "dlion_mavo"
    done = bench.compare("--publish", str(bench.folder / "published"))
    assert done.returncode == 0, done.stderr
    sizes = {
        folder: json.loads((bench.output / folder / "results.json").read_text())["world_size"]
        for folder in bench.summary["ordinary"]
    }
    expected = {"base/workers_1": None, "adamw_torch/workers_1": None, "adamw_torch/workers_2": "2"}
    assert sizes == {f"{name}/lr_0.2/seed_1": size for name, size in expected.items()}
    assert "| adamw_torch | 2 | 0.2 | 0.1 | 1.0010; 1 | 2.72 | +0.0% | 10 |" in bench.page
    assert (bench.output / "loss_over_workers.png").exists()
    assert (bench.folder / "published/adamw_torch_2_workers/README.md").exists()


def test_the_best_runs_are_scored(bench: Bench) -> None:
    script = bench.folder / "evaluation.py"
    script.write_text(EVALUATION)
    bench.study["evaluation"] = {
        "script": str(script),
        "arguments": {"limit": 7},
        "num_fewshot": [3, 0],
        "models": {"before": "a/model"},
    }
    first = bench.compare("--tune", "--jobs", "2", "--publish", str(bench.folder / "published"))
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("running") == 8 + 2 * 3
    assert "## Benchmarks" in bench.page
    for shots in (3, 0):
        assert "| scores of before, base, worse_by_a_lot |" in (bench.output / f"scores/{shots}shot.md").read_text()
        scores = json.loads((bench.folder / f"published/base/{shots}shot.json").read_text())
        assert scores["limit"] == "7"
        assert (bench.folder / f"published/before/{shots}shot.json").exists()
    card = (bench.folder / "published/base/README.md").read_text()
    assert card == "# A card, scored with 3 shots, scored with 0 shots"
    assert bench.compare("--tune").stdout.count("running") == 0

    # A model that was trained again is scored again; the others are not.
    (bench.output / "base/workers_1/lr_0.2/seed_1/results.json").unlink()
    bench.script.write_text(SCRIPT.replace('"bytes_sent": 10', '"bytes_sent": 11'))
    again = bench.compare("--tune")
    lines = [line.split()[1] for line in again.stdout.splitlines() if line.startswith("running ")]
    assert lines == ["base/workers_1/lr_0.2/seed_1", "scores/3shot/base", "scores/0shot/base"]


def test_a_run_that_diverged_is_no_mean(bench: Bench) -> None:
    bench.script.write_text(SCRIPT.replace("loss = 1 +", "loss = float('nan') if given.seed == 2 else 1000 +"))
    done = bench.compare("--tune")
    assert done.returncode == 0, done.stderr
    assert "| base | 1 | 0.2 | 0.005 | 1 not finite; 2 | - | - | 10 |" in bench.page
    bench.study["seeds"] = [1]
    assert bench.compare("--tune").returncode == 0
    assert "| base | 1 | 0.2 | 0.005 | 1000.0010; 1 | inf | +0.0% | 10 |" in bench.page


def test_the_study_in_the_readme_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = (ROOT / "examples/README.md").read_text()
    path = tmp_path / "study.yaml"
    path.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    study = Study.read(path)
    assert len(runs.ordinary(study, {label: study.grid(label)[0] for label in study.methods})) == 2 * 2 * 2


@pytest.mark.parametrize("name", ["gpt2_text", "alpaca_stories260k"])
def test_our_studies_are_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = Study.read(ROOT / f"examples/studies/{name}.yaml")
    searched = [run.folder for label in study.methods for run in runs.search(study, label)]
    compared = [run.folder for run in runs.ordinary(study, {label: study.grid(label)[1] for label in study.methods})]
    assert set(searched) & set(compared)
    assert len(set(searched) | set(compared)) == {"gpt2_text": 4 * (4 + 2), "alpaca_stories260k": 5 * 3}[name]
    four = runs.cell(study, runs.search(study, "dlion_mavo")[0])
    assert " ".join(four.launcher).endswith("--config_file examples/launch/cpu_2.yaml --num_processes 4")
    assert runs.cell(study, runs.search(study, "Lion, one process")[0]).launcher == ()
