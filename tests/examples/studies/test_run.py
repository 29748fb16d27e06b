"""Studies by accuracy, with virtual workers: what is run and in which order, what is not run again, and the page."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

from hf_dlion.trainer.methods import METHODS
from studies import runs
from studies.cells import Cell, StudyError
from studies.paper import PAPER
from studies.study import Study

from ..command import ROOT, run_module

# Obeys the contract of train_vit.py. Best at a learning rate of 3e-4; fails, or stays, where files beside it say so.
SCRIPT = """
import argparse, json, math, pathlib, subprocess, sys, time
parser = argparse.ArgumentParser()
for name in ("virtual_workers", "seed", "adversaries", "num_train_epochs"):
    parser.add_argument(f"--{name}", type=int, default=0)
parser.add_argument("--learning_rate", type=float)
parser.add_argument("--output_dir", type=pathlib.Path)
for name in ("optim", "adversary", "weight_decay", "drop_share", "shift"):
    parser.add_argument(f"--{name}")
given = parser.parse_args()
here = pathlib.Path(__file__).parent
if (here / "failing").exists() and (here / "failing").read_text() in str(given.output_dir):
    sys.exit(3)
if (here / "staying").exists():
    grandchild = subprocess.Popen(["sleep", "60"])
    (given.output_dir / "pids").write_text(str(grandchild.pid))
    time.sleep(60)
top = 0.5 + 0.1 * (given.optim == "dlion_mavo") + given.virtual_workers / 100 + given.seed / 1000
top -= 0.05 * given.adversaries * (2 if given.adversary == "flip" else 1)
top -= 0.1 * abs(math.log10(given.learning_rate / 3e-4))
history = [
    {"epoch": float(epoch), "eval_accuracy": top * epoch / given.num_train_epochs, "eval_loss": 1 - top}
    for epoch in range(given.num_train_epochs + 1)
]
found = {
    "log_history": history, "trainable_parameters": 1000, "bytes_counted_steps": 10,
    "bytes_sent": 10000 * given.virtual_workers // 8, "bytes_received": 5000, "seconds": 1.0, "steps": 10,
    "versions": {"torch": "2.13"}, "machine": "a machine",
}
(given.output_dir / "results.json").write_text(json.dumps(found))
"""


class Bench:
    """A study in a folder, with its stand-in for the training script."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out"
        (folder / "script.py").write_text(SCRIPT)
        self.study: dict[str, Any] = {
            "title": "A study",
            "script": str(folder / "script.py"),
            "measure": "accuracy",
            "virtual": True,
            "workers": [2, 4],
            "seeds": [1, 2],
            "arguments": {"num_train_epochs": 3},
            "methods": {"dlion_mavo": None, "gadamw": {"seeds": [1], "learning_rate": 1e-3}},
        }

    def written(self) -> Path:
        path = self.folder / "study.yaml"
        path.write_text(yaml.safe_dump(self.study, sort_keys=False))
        return path

    def words(self, *words: str) -> list[str]:
        return [str(self.written()), "--output", str(self.output), *words]

    def compare(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run_module("examples.studies.run", *self.words(*words))

    def begin(self, *words: str) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "examples.studies.run", *self.words(*words)]
        return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)

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


def started(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith("running ")]


MAVO = "dlion_mavo/workers_{}/lr_5e-05/seed_{}"
ADAMW = "gadamw/workers_{}/lr_0.001/seed_1"


def test_seed_by_seed_and_nothing_twice(bench: Bench) -> None:
    first = bench.compare()
    assert first.returncode == 0, first.stderr
    assert started(first) == [
        MAVO.format(2, 1),
        ADAMW.format(2),
        MAVO.format(4, 1),
        ADAMW.format(4),
        MAVO.format(2, 2),
        MAVO.format(4, 2),
    ]
    assert "Incomplete" not in bench.page
    again = bench.compare("--jobs", "2")
    assert again.returncode == 0
    assert started(again) == []


def test_a_published_study_is_gone_on_with(bench: Bench) -> None:
    bench.compare()
    before, page = bench.summary, bench.page
    published = bench.output.rename(bench.folder / "published") / "summary.json"
    bench.study["methods"]["glion"] = {"seeds": [2]}
    bench.study["methods"]["gadamw"]["weight_decay"] = 0.1  # with other arguments, a run in the same folder is another
    done = bench.compare("--published", str(published))
    assert done.returncode == 0, done.stderr
    assert {name.partition("/")[0] for name in started(done)} == {"glion", "gadamw"}
    kept = [run for run in before["runs"] if run["method"] == "dlion_mavo"]
    assert [run for run in bench.summary["runs"] if run["method"] == "dlion_mavo"] == kept
    rows = [line for line in page.splitlines() if line.startswith("| `dlion_mavo`")]
    assert rows == [line for line in bench.page.splitlines() if line.startswith("| `dlion_mavo`")] != []
    assert started(bench.compare("--published", str(published))) == []

    published.write_text("{}")
    wrong = bench.compare("--published", str(published))
    assert wrong.returncode == 1
    assert "it is no summary.json of a study" in wrong.stderr


def test_what_is_not_whole_is_run_again(bench: Bench) -> None:
    bench.compare()
    cells = [MAVO.format(2, 1), ADAMW.format(2), MAVO.format(4, 1), ADAMW.format(4)]
    broken, gone, unstamped, changed = (bench.output / cell for cell in cells)
    half = (broken / "results.json").read_text()[:-20]
    (broken / "results.json").write_text(half)
    (gone / "results.json").unlink()
    (unstamped / "cell.json").unlink()
    results = json.loads((changed / "results.json").read_text())
    del results["bytes_sent"]
    (changed / "results.json").write_text(json.dumps(results))
    again = bench.compare()
    assert started(again) == cells
    assert "results.json is broken" in again.stdout
    assert "did not end well" in again.stdout

    bench.study["methods"]["gadamw"]["shift"] = 2
    changed_run = bench.compare()
    assert started(changed_run) == [ADAMW.format(2), ADAMW.format(4)]
    assert "its command changed: nothing more before, --shift=2 now" in changed_run.stdout
    assert "Incomplete" not in bench.page


def test_lists_are_words_and_none_is_left_out() -> None:
    cell = Cell("folder", "script.py", {"tasks": ["arc", "boolq"], "limit": None, "seed": 1}, ())
    assert cell.words == ["script.py", "--tasks", "arc", "boolq", "--seed=1"]


def test_a_failure_does_not_stop_the_others(bench: Bench) -> None:
    failing = bench.folder / "failing"
    failing.write_text(MAVO.format(2, 1))
    done = bench.compare("--jobs", "2")
    assert done.returncode == 1
    assert len(started(done)) == 6
    log = bench.output / MAVO.format(2, 1) / "log.txt"
    assert "exit code 3" in done.stderr
    assert str(log) in done.stderr
    assert log.exists()
    assert f"- `{MAVO.format(2, 1)}`, failed" in bench.page
    assert bench.summary["missing"] == [MAVO.format(2, 1)]
    assert "; 1 of 2 |" in bench.page
    failing.unlink()
    repaired = bench.compare()
    assert repaired.returncode == 0
    assert started(repaired) == [MAVO.format(2, 1)]
    assert "Incomplete" not in bench.page


def test_a_script_that_leaves_nothing_has_failed(bench: Bench) -> None:
    (bench.folder / "script.py").write_text("pass")
    done = bench.compare()
    assert done.returncode == 1
    assert "left no results.json with log_history" in done.stderr


def test_a_script_that_does_not_evaluate(bench: Bench) -> None:
    (bench.folder / "script.py").write_text(SCRIPT.replace("eval_accuracy", "accuracy"))
    done = bench.compare()
    assert done.returncode == 1
    assert "its log has no eval_accuracy" in done.stderr


def test_runs_of_different_data_are_not_compared(bench: Bench) -> None:
    keyed = SCRIPT.replace('"steps": 10,', '"steps": 10, "dataset_key": str(given.seed) * 64,')
    (bench.folder / "script.py").write_text(keyed)
    bench.study["methods"] = {"dlion_mavo": {"seeds": [1]}}
    assert bench.compare().returncode == 0
    assert {run["dataset_key"] for run in bench.summary["runs"]} == {64 * "1"}
    bench.study["methods"]["dlion_mavo"]["seeds"] = [1, 2]
    done = bench.compare()
    assert done.returncode == 1
    assert "seed_1 of data with the key 11111111" in done.stderr
    assert "cannot be compared" in done.stderr


def test_the_search(bench: Bench) -> None:
    bench.study["tune"] = {"factors": [30, 1, 10], "workers": 2, "seed": 2, "epochs": 1}
    bench.study["methods"]["terngrad"] = {"seeds": [1]}  # from 1e-3 on: best at the first
    done = bench.compare("--tune")
    assert done.returncode == 0, done.stderr
    search = bench.summary["search"]
    assert {len(found["tried"]) for found in search.values()} == {3}
    assert [rate for rate, _ in search["dlion_mavo"]["tried"]] == [5e-5, 5e-4, 1.5e-3]
    assert started(done)[:3] == [f"dlion_mavo/search_1_epochs/workers_2/lr_{rate}/seed_2" for rate in _RATES]
    assert bench.summary["learning_rates"] == {"dlion_mavo": 5e-4, "gadamw": 1e-3, "terngrad": 1e-3}
    assert [search[label]["at_edge"] for label in bench.study["methods"]] == [False, True, True]
    assert "| `dlion_mavo` | 5e-05: 54.42, **0.0005: 59.98**, 0.0015: 55.21 |  |" in bench.page
    assert "may be better still: `gadamw`, `terngrad`." in bench.page
    assert "chosen on the test set" in bench.page
    assert started(bench.compare("--tune")) == []

    # A larger one that failed was tried, so the edge is where it was.
    (bench.folder / "failing").write_text("gadamw/search_1_epochs/workers_2/lr_0.001")
    (bench.output / "gadamw/search_1_epochs/workers_2/lr_0.001/seed_2/cell.json").unlink()
    failed = bench.compare("--tune")
    assert failed.returncode == 1
    found = bench.summary["search"]["gadamw"]
    assert (found["best"], found["at_edge"]) == (1e-2, False)
    assert "0.001: no result, **0.01:" in bench.page


_RATES = ("5e-05", "0.0005", "0.0015")


def test_a_search_without_result(bench: Bench) -> None:
    bench.study["tune"] = {"factors": [1, 10], "workers": 2, "seed": 1}
    (bench.folder / "failing").write_text("gadamw")
    done = bench.compare("--tune")
    assert done.returncode == 1
    assert "all of `gadamw`: no run of its search is finished" in bench.page
    # With the study's own epochs, a run of the search is one of the study's.
    assert len(started(done)) == 4 + 3


def test_the_report_of_what_there_is(bench: Bench) -> None:
    empty = bench.compare("--report-only")
    assert empty.returncode == 0, empty.stderr
    assert started(empty) == []
    assert len(bench.summary["missing"]) == 6
    assert "![" not in bench.page

    bench.compare()
    (bench.output / MAVO.format(4, 2) / "results.json").unlink()
    (bench.output / ADAMW.format(4) / "results.json").unlink()
    some = bench.compare("--report-only")
    assert some.returncode == 0
    assert started(some) == []
    assert f"These runs are missing:\n\n- `{ADAMW.format(4)}`\n- `{MAVO.format(4, 2)}`\n\n" in bench.page
    mavo = 100 * (0.6 - 0.1 * math.log10(6))
    assert f"| 5e-05 | 0.005 | {mavo + 2.15:.2f} ({mavo + 2.1:.2f} to {mavo + 2.2:.2f}); 2 |" in bench.page
    assert f"| {mavo + 4.1:.2f}; 1 of 2 |" in bench.page
    assert "; 1 | missing |" in bench.page
    assert not [word for word in bench.summary["command"].split() if word == "--report-only"]


def test_tables_and_pictures(bench: Bench) -> None:
    bench.study["adversaries"] = {
        "methods": ["dlion_mavo", "gadamw"],
        "workers": 4,
        "counts": [1, 2],
        "kinds": ["flip", "random"],
    }
    (bench.folder / "words.md").write_text("What was found.\n")
    bench.study["findings"] = "words.md"
    done = bench.compare("--jobs", "3", "--publish", str(bench.folder / "published"))
    assert done.returncode == 0, done.stderr
    assert len(started(done)) == 6 + 8
    assert bench.page.startswith("# A study\n\nWhat was found.\n")

    mavo = 100 * (0.6 - 0.1 * math.log10(6)) + 4.1
    row = f"| `dlion_mavo` | flip | {mavo:.2f}; 1 | {mavo - 10:.2f}; 1 | {mavo - 20:.2f}; 1 |"
    assert row in bench.page
    assert f"| `dlion_mavo` | random | {mavo:.2f}; 1 | {mavo - 5:.2f}; 1 | {mavo - 10:.2f}; 1 |" in bench.page
    # The stand-in says that it sent one bit a worker.
    predicted = "0.750 + 1.500 = 2.250"
    assert f"| `dlion_mavo` | 4 | 1.00, 1.00 | {predicted} | 4.000 | 4.000 | {4 / 2.25:.3f} |" in bench.page
    assert "| `gadamw` | 2 | 32.00, 32.00 | 16.000 + 16.000 = 32.000 | 2.000 | 4.000 | 0.062 |" in bench.page
    assert "On a machine, with torch 2.13." in bench.page

    names = ["accuracy_over_epochs", "accuracy_over_workers", "error_over_bits", "accuracy_over_adversaries"]
    colours = [(31, 119, 180), (214, 39, 40)]  # of the first two methods
    for name in names:
        assert f"]({name}.png)" in bench.page
        assert all(_has_colour(bench.output / f"{name}.png", colour) for colour in colours), name
    published = sorted(path.name for path in (bench.folder / "published").iterdir())
    assert published == sorted(["README.md", "summary.json", *(f"{name}.png" for name in names)])


def _has_colour(picture: Path, colour: tuple[int, int, int]) -> bool:
    from matplotlib.image import imread

    pixels = np.rint(255 * imread(picture)[..., :3])
    return bool((np.abs(pixels - colour).max(-1) < 40).sum() > 50)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_no_child(bench: Bench, number: signal.Signals) -> None:
    (bench.folder / "staying").touch()
    process = bench.begin("--jobs", "2")
    until = time.monotonic() + 60
    while len(files := list(bench.output.glob("**/pids"))) < 2 or not all(file.read_text() for file in files):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) == 4  # two scripts, each with a child
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode not in (0, None)
    assert "stopped" in errors
    assert "Traceback" not in errors
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not list(bench.output.glob("**/cell.json"))

    (bench.folder / "staying").unlink()
    again = bench.compare()
    assert again.returncode == 0, again.stderr
    assert len(started(again)) == 6


ATTACK = {"methods": ["dlion_mavo"], "workers": 4, "counts": [1], "kinds": ["flip"]}
TUNE = {"workers": 4, "seed": 1}
UNEQUAL = [{"optim": "dgc", "learning_rates": rates} for rates in ([1, 2], [1, 2, 3])]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wrokers": [2]}, "study.yaml: the study has wrokers, which is not known; it takes title.*workers"),
        ({"workers": None}, "workers=None is not a list of numbers"),
        ({"workers": [0, 2]}, "workers=.0, 2. is not a list of numbers from 1 on"),
        ({"seeds": 1}, "seeds=1 is not a list"),
        ({"script": "no.py"}, "there is no no.py"),
        ({"methods": ["dlion_mavo"]}, "methods is a list"),
        ({"methods": {"dlion": None}}, "'dlion' has optim='dlion'.*dlion_mavo"),
        ({"methods": {"dlion_mavo": {"seed": 3}}}, "dlion_mavo: seed cannot stand there"),
        ({"methods": {"dlion_mavo": {"learning_rate": "fast"}}}, "learning_rate='fast' is not a number above 0"),
        ({"methods": {"a b": {"optim": "dgc"}, "a_b": {"optim": "dgc"}}}, "would share a folder"),
        ({"arguments": {"output_dir": "x"}}, "arguments: output_dir cannot stand there"),
        ({"tune": {"factors": [1], "workers": 4, "seed": 1}}, r"factors=\[1\] is not a search"),
        ({"tune": {"factors": [1, 3], "workers": 4, "seed": 1, "epochs": "few"}}, "epochs='few' is not a number"),
        ({"tune": {"factors": [1, 3], "seed": 1}}, "tune lacks workers"),
        ({"tune": {"factors": [1, 3], "workers": 4, "seed": 1, "rates": 1}}, "tune has rates, which is not known"),
        ({"adversaries": {"methods": ["dgc"], "workers": 4, "counts": [1], "kinds": ["flip"]}}, "dgc is not among"),
        ({"adversaries": {"methods": [], "workers": 4, "counts": [5], "kinds": ["flip"]}}, "counts has 5.*4 workers"),
        ({"adversaries": {"methods": [], "workers": 4, "counts": [1], "kinds": ["lie"]}}, "kinds=.'lie'.*flip, random"),
        ({"findings": "no.md"}, "findings: no.md cannot be read"),
        ({"measure": "speed"}, "measure='speed' is not one of loss, accuracy"),
        ({"virtual": "yes, please"}, "virtual='yes, please' is neither true nor false"),
        ({"virtual": False, "launch": "no.yaml"}, "there is no no.yaml"),
        ({"virtual": False, "adversaries": ATTACK}, "among virtual workers only; write virtual: true"),
        ({"methods": {"adamw_torch": {"learning_rate": 1e-3}}}, "'adamw_torch' has optim='adamw_torch', which is not"),
        (
            {"virtual": False, "methods": {"adamw_torch": None}},
            "adamw_torch has no learning rate",
        ),
        ({"methods": {"adamw_torch": {"gradient_votes": "avg"}}}, "adamw_torch has no learning rate"),
        ({"virtual": False, "methods": {"sgd": {"learning_rate": 1}}}, "sgd has no weight_decay"),
        ({"workers": []}, "dlion_mavo has no workers; write workers: .2, 4."),
        ({"methods": {"dlion_mavo": {"workers": "all"}}}, "dlion_mavo: workers='all' is not a list of numbers"),
        ({"methods": {"dlion_mavo": {"learning_rates": [1]}}}, "learning_rates=.1. is not a search"),
        (
            {"methods": {"a": UNEQUAL[0], "b": UNEQUAL[1]}, "tune": TUNE},
            "different numbers of .*a 2, b 3",
        ),
        ({"tune": {"workers": 4, "seed": 1}}, "tune lacks factors; dlion_mavo, gadamw has no learning_rates either"),
        ({"evaluation": {"shots": [3]}}, "evaluation has shots, which is not known; it takes arguments, num_fewshot"),
    ],
)
def test_studies_that_cannot_be(bench: Bench, changes: dict[str, Any], message: str) -> None:
    bench.study |= changes
    path = bench.written()
    with pytest.raises(StudyError, match=message):
        Study.read(path)


def test_errors_come_without_traceback(bench: Bench) -> None:
    untuned = bench.compare("--tune")
    assert untuned.returncode == 1
    assert "studies.run: --tune, and the study has no 'tune'" in untuned.stderr
    assert "Traceback" not in untuned.stderr
    assert "--jobs 0" in bench.compare("--jobs", "0").stderr


def test_the_table_is_the_papers(bench: Bench) -> None:
    bench.study |= {"methods": {name: {} for name in METHODS} | {"slow": {"optim": "dgc", "learning_rate": "1e-4"}}}
    bench.study["arguments"] = {"weight_decay": 0.5}
    study = Study.read(bench.written())
    assert set(PAPER) == set(METHODS)
    assert [study.usual_rate(name) for name in METHODS] == [5e-5] * 4 + [1e-4] * 2 + [5e-5] + [1e-4] * 2 + [
        1e-3,
        1e-3,
        1e-2,
    ]
    assert study.usual_rate("slow") == 1e-4
    assert study.settings("dgc") == {"learning_rate": 1e-2, "drop_share": 0.96, "weight_decay": 0.5, "optim": "dgc"}
    del bench.study["methods"]
    assert list(Study.read(bench.written()).methods) == list(METHODS)


@pytest.mark.parametrize("path", sorted((ROOT / "examples/studies").glob("*_vit.yaml")), ids=lambda p: p.stem)
def test_our_studies_are_read(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / yaml.safe_load(path.read_text())["script"]
    script.parent.mkdir()
    script.touch()
    monkeypatch.chdir(tmp_path)
    study = Study.read(path)
    rates = runs.usual_rates(study)
    assert {study.optim(label) for label in study.methods} == set(METHODS)
    folders = {run.folder for run in [*runs.ordinary(study, rates), *runs.attacked(study, rates)]}
    assert len(folders) == {"cifar10_vit": 8 * 3 * 3 + 5 * 3 + 4 * 3 * 2, "digits_vit": 12 * 2}[path.stem]
