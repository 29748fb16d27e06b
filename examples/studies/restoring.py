"""The runs of a published study, taken over into another output folder, so that what is new alone is run."""

import json
from pathlib import Path
from typing import Any

from . import runs
from .cells import STAMP, StudyError, results_of
from .records import KEPT
from .runs import Run
from .study import Study


def restore(study: Study, summary: Path, root: Path) -> int:
    """Writes what the page needs of each run in a `summary.json` that this study would run alike, and is not there.

    Returns:
        Of how many.

    Raises:
        StudyError: it is no summary of a study.
    """
    try:
        found: list[dict[str, Any]] = json.loads(summary.read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StudyError(f"{summary}: it is no summary.json of a study ({error!r}).") from error
    restored = 0
    for one in found:
        run = Run(**{name: one[name] for name in Run.__dataclass_fields__})
        if run.method not in study.methods:
            continue
        cell = runs.cell(study, run)
        alike = one["settings"] == study.settings(run.method) | {"learning_rate": run.learning_rate}
        if alike and one["folder"] == cell.folder and results_of(cell, root) is None:
            folder = root / cell.folder
            folder.mkdir(parents=True, exist_ok=True)
            (folder / cell.results).write_text(json.dumps(_results(one)) + "\n", encoding="utf-8")
            (folder / STAMP).write_text(json.dumps({"command": cell.stamp}) + "\n", encoding="utf-8")
            restored += 1
    return restored


def _results(one: dict[str, Any]) -> dict[str, Any]:
    """As the script left it, as far as a record tells."""
    losses = one.get("losses") or [[one["steps"], one["final_loss"]]]  # older summaries have the last alone
    history: list[dict[str, Any]] = [{"step": step, "eval_loss": loss} for step, loss in losses]
    history += [{"epoch": epoch, "eval_accuracy": accuracy} for epoch, accuracy in one["accuracies"]]
    counted = one["trainable_parameters"] * one["steps"] / 8

    def count(bits: float | None) -> int | None:
        return None if bits is None else round(bits * counted)

    return {key: one.get(key) for key in KEPT} | {
        "log_history": history,
        "bytes_counted_steps": one["steps"],
        "bytes_sent": count(one["bits_sent"]),
        "bytes_received": count(one["bits_received"]),
    }
