"""The paper's comparison: methods x numbers of workers x seeds, their accuracy, and the bits that they sent.

    python examples/compare_methods.py examples/configs/studies/digits_vit.yaml --output out/digits_vit --tune

A study is a YAML file: arguments for all runs, the methods with what is their own (else the paper's learning rates and
weight decays for CIFAR-10), numbers of workers, seeds, and, where wanted, runs with adversaries. `--tune` first
searches each method's learning rate, as the study's `tune` says, with the same number of runs for every method. A run
that has ended well is not run again, so the command can be stopped and repeated; one that failed, broke, or whose
command changed is. It leaves, beside the runs, `summary.json`, pictures, and `README.md` with the tables;
`--report-only` makes these of what there is.
"""

import argparse
import json
import math
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from methods_pictures import draw
from methods_report import page
from methods_study import Run, Study
from study_cells import StudyError, results_of, run_cells


def record(study: Study, run: Run, root: Path) -> dict[str, Any] | None:
    """What the report needs of a finished run, as JSON takes it; None of another."""
    results = results_of(study.cell(run), root)
    if results is None:
        return None
    history = results["log_history"]
    parameter_steps = results["trainable_parameters"] * results["bytes_counted_steps"]
    received = results.get("bytes_received")
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    accuracies = [[entry["epoch"], entry["eval_accuracy"]] for entry in history if "eval_accuracy" in entry]
    if not accuracies:
        raise StudyError(f"{root / run.folder}: its log has no eval_accuracy. Let the script evaluate, each epoch.")
    return {
        "folder": run.folder,
        **asdict(run),
        "settings": study.settings(run.method) | {"learning_rate": run.learning_rate},
        "final_accuracy": accuracies[-1][1],
        "final_loss": losses[-1] if losses and math.isfinite(losses[-1]) else None,
        "accuracies": accuracies,
        "bits_sent": 8 * results["bytes_sent"] / parameter_steps,
        "bits_received": None if received is None else 8 * received / parameter_steps,
        **{key: results.get(key) for key in ("trainable_parameters", "steps", "seconds", "versions", "machine")},
    }


def choose(study: Study, label: str, root: Path) -> dict[str, Any]:
    """The search of a method: what each learning rate came to, and the best, by the last accuracy, then the loss."""
    runs = study.search(label)
    found = {run.learning_rate: record(study, run, root) for run in runs}
    done = {rate: one for rate, one in found.items() if one is not None}

    def merit(rate: float) -> tuple[float, float]:
        loss = done[rate]["final_loss"]
        return done[rate]["final_accuracy"], -math.inf if loss is None else -loss

    best = max(done, key=merit) if done else None
    return {
        "runs": [run.folder for run in runs],
        "accuracies": [[rate, None if one is None else one["final_accuracy"]] for rate, one in found.items()],
        "best": best,
        "at_edge": best in (runs[0].learning_rate, runs[-1].learning_rate),
    }


def run_study(study: Study, root: Path, tune: bool, jobs: int | None) -> dict[str, Any]:
    """Runs what is not finished (nothing if `jobs` is None), and summarises."""
    failed: dict[str, str] = {}

    def make(runs: Sequence[Run]) -> list[Run]:
        runs = list({run.folder: run for run in runs}.values())
        if jobs is not None:
            failed.update(run_cells([study.cell(run) for run in runs], root, jobs))
        return runs

    rates, search = {label: study.usual_rate(label) for label in study.methods}, None
    if tune:
        searched = make([run for label in study.methods for run in study.search(label)])
        search = {label: choose(study, label, root) for label in study.methods}
        rates = {label: found["best"] for label, found in search.items() if found["best"] is not None}
    else:
        searched = []
    ordinary, attacked = study.ordinary(rates), study.attacked(rates)
    compared = make([*ordinary, *attacked])
    records = {run.folder: record(study, run, root) for run in [*searched, *compared]}
    return {
        "title": study.title,
        "study": asdict(study),
        "learning_rates": rates,
        "weight_decays": {label: float(study.settings(label)["weight_decay"]) for label in study.methods},
        "search": search,
        "runs": [found for found in records.values() if found is not None],
        "ordinary": [run.folder for run in ordinary],
        "attacked": [run.folder for run in attacked],
        "missing": [folder for folder, found in records.items() if found is None],
        "failed": failed,
    }


def publish(root: Path, target: Path) -> None:
    """Copies the page, its numbers and its pictures."""
    target.mkdir(parents=True, exist_ok=True)
    for path in [root / "README.md", root / "summary.json", *root.glob("*.png")]:
        shutil.copy(path, target / path.name)


def main() -> int:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and the comparison")
    parser.add_argument("--tune", action="store_true", help="search the learning rates, as the study says")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--report-only", action="store_true", help="run nothing, draw what there is")
    parser.add_argument("--publish", type=Path, help="folder to copy the page, its numbers and its pictures to")
    options = parser.parse_args()
    if options.jobs < 1:
        raise StudyError(f"--jobs {options.jobs}: at least one run at a time.")
    study = Study.read(options.study)
    options.output.mkdir(parents=True, exist_ok=True)
    found = run_study(study, options.output, options.tune, None if options.report_only else options.jobs)
    found["command"] = shlex.join(["python", *(word for word in sys.argv if word != "--report-only")])
    (options.output / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    pictures = draw(found, options.output)
    text = page(found, pictures)
    (options.output / "README.md").write_text(text, encoding="utf-8")
    print(text)
    if options.publish is not None:
        publish(options.output, options.publish)
    for folder, failure in found["failed"].items():
        print(f"{folder} {failure}", file=sys.stderr)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StudyError as error:
        sys.exit(f"compare_methods.py: {error}")
    except KeyboardInterrupt:
        sys.exit("compare_methods.py: stopped. The same command goes on; with --report-only it draws what there is.")
