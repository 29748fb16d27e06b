"""Runs a study: training runs that differ in method, number of workers, seed or adversaries; and makes its page.

    python -m examples.studies.run examples/studies/digits_vit.yaml --output out/digits_vit --tune

A study is a YAML file: a task script and arguments for all runs, the methods with what is their own (else the paper's
learning rates and weight decays for CIFAR-10), numbers of workers, seeds, and, where wanted, runs with adversaries and
benchmarks for the best runs. Workers are processes, or with `virtual: true` take turns in one. `--tune` first searches
each method's learning rate, as the study's `tune` says, with the same number of runs for every method. A run that has
ended well is not run again, so the command can be stopped and repeated; one that failed, broke, or whose command
changed is. It leaves, beside the runs, `summary.json`, pictures, and `README.md` with the tables; `--report-only` makes
these of what there is. `--publish FOLDER` copies them, and of each method the model card of its best run.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import runs, scores
from .cells import StudyError, run_cells
from .page import page
from .pictures import draw
from .publishing import publish
from .records import check_data, choose, record
from .restoring import restore
from .runs import Run
from .study import Study

NAME = "studies.run"


def run_study(study: Study, root: Path, tune: bool, jobs: int | None) -> dict[str, Any]:
    """Runs what is not finished (nothing if `jobs` is None), and summarises."""
    failed: dict[str, str] = {}

    def make(wanted: Sequence[Run]) -> list[Run]:
        unique = list({run.folder: run for run in wanted}.values())
        if jobs is not None:
            failed.update(run_cells([runs.cell(study, run) for run in unique], root, jobs))
        return unique

    searched: list[Run] = []
    search: dict[str, Any] | None = None
    if tune:
        searched = make([run for label in study.methods for run in runs.search(study, label)])
        search = {label: choose(study, label, root) for label in study.methods}
        rates = {label: found["best"] for label, found in search.items() if found["best"] is not None}
    else:
        rates = runs.usual_rates(study)
    ordinary, attacked = runs.ordinary(study, rates), runs.attacked(study, rates)
    compared = make([*ordinary, *attacked])
    if jobs is not None:
        failed |= scores.score(study, rates, root, jobs)
    records = {run.folder: record(study, run, root) for run in [*searched, *compared]}
    done = [found for found in records.values() if found is not None]
    check_data(done)
    return {
        "title": study.title,
        "study": asdict(study),
        "learning_rates": rates,
        "weight_decays": {label: float(study.settings(label)["weight_decay"]) for label in study.methods},
        "search": search,
        "runs": done,
        "ordinary": [run.folder for run in ordinary],
        "attacked": [run.folder for run in attacked],
        "scores": scores.tables(study, root),
        "missing": [folder for folder, found in records.items() if found is None],
        "failed": failed,
    }


def parse() -> argparse.Namespace:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{NAME}",
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and the page")
    parser.add_argument("--tune", action="store_true", help="search the learning rates, as the study says")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--published", type=Path, metavar="JSON", help="a summary.json whose runs need no other run")
    parser.add_argument("--report-only", action="store_true", help="run nothing, make the page of what there is")
    parser.add_argument("--publish", type=Path, help="folder to copy the page, its numbers, pictures and cards to")
    options = parser.parse_args()
    if options.jobs < 1:
        raise StudyError(f"--jobs {options.jobs}: at least one run at a time.")
    return options


def main() -> int:
    options = parse()
    study = Study.read(options.study)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.published is not None:
        print(f"taken over from {options.published}: {restore(study, options.published, options.output)} runs")
    found = run_study(study, options.output, options.tune, None if options.report_only else options.jobs)
    words = [word for word in sys.argv[1:] if word != "--report-only"]
    found["command"] = shlex.join(["python", "-m", f"examples.{NAME}", *words])
    (options.output / "summary.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    text = page(found, draw(found, options.output))
    (options.output / "README.md").write_text(text, encoding="utf-8")
    print(text)
    if options.publish is not None:
        publish(study, found["learning_rates"], options.output, options.publish)
    for folder, failure in found["failed"].items():
        print(f"{folder} {failure}", file=sys.stderr)
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except StudyError as error:
        sys.exit(f"{NAME}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{NAME}: stopped. The same command goes on; with --report-only it makes the page of what there is.")
