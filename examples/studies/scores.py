"""The best runs of a study, scored on benchmarks by `evaluate_3shot.py`."""

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import runs
from .cells import Cell, StudyError, results_of, run_cells
from .runs import Run
from .study import Evaluation, Study, slug

FOLDER = "scores"
CARD = "README.md"


def score(study: Study, rates: Mapping[str, float], root: Path, jobs: int) -> dict[str, str]:
    """Scores each best run, and the study's other models, with each number of shots; and makes a table of each.

    Returns:
        Of the evaluations that failed, by folder, what happened and where their output is.
    """
    evaluation = study.evaluation
    if evaluation is None:
        return {}
    failed: dict[str, str] = {}
    for shots in evaluation.num_fewshot:
        cells = _cells(study, evaluation, shots, rates, root)
        failed |= run_cells(cells, root, jobs)
        scored = [str(root / cell.folder) for cell in cells if results_of(cell, root) is not None]
        if len(scored) > 1:
            _compare(evaluation, shots, scored, root / FOLDER)
    return failed


def tables(study: Study, root: Path) -> list[str]:
    """The table of each number of shots that there is one of."""
    numbers = [] if study.evaluation is None else study.evaluation.num_fewshot
    paths = [root / FOLDER / f"{shots}shot.md" for shots in numbers]
    return [path.read_text(encoding="utf-8") for path in paths if path.is_file()]


def folder_of(label: str, shots: int) -> str:
    """Where the scores of a run or model are, below the root of the study."""
    return f"{FOLDER}/{shots}shot/{label}"


def label_of(study: Study, run: Run) -> str:
    """The method, with the number of workers where it has several."""
    several = len(study.workers_of(run.method)) > 1
    return slug(run.method) + (f"_{run.workers}_workers" if several else "")


def _cells(study: Study, evaluation: Evaluation, shots: int, rates: Mapping[str, float], root: Path) -> list[Cell]:
    """Models that were given first, then the best runs that are finished."""
    wanted: list[tuple[str, dict[str, Any], tuple[str, ...]]] = []
    for label, model in evaluation.models.items():
        wanted.append((slug(label), {"model": model}, ()))
    for run in runs.best(study, rates):
        if results_of(runs.cell(study, run), root) is None:
            continue
        own = root / run.folder
        arguments = {"model": own} | ({"model_card": True} if (own / CARD).is_file() else {})
        trained = hashlib.sha256((own / "results.json").read_bytes()).hexdigest()[:16]
        wanted.append((label_of(study, run), arguments, (f"{run.folder} {trained}",)))
    results = f"{shots}shot.json"
    return [
        Cell(
            folder_of(label, shots),
            evaluation.script,
            evaluation.arguments | own | {"num_fewshot": shots},
            needs=("tasks", "average"),
            results=results,
            inputs=inputs,
        )
        for label, own, inputs in wanted
    ]


def _compare(evaluation: Evaluation, shots: int, folders: list[str], target: Path) -> None:
    words = [sys.executable, evaluation.script, "--num_fewshot", str(shots), "--compare", *folders]
    done = subprocess.run([*words, "--output_dir", str(target)], capture_output=True, text=True)
    if done.returncode:
        raise StudyError(f"{evaluation.script} cannot compare {', '.join(folders)}: {done.stderr.strip()}")
