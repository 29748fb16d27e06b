"""What the page needs of a finished run, and which learning rate of a search is best."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import runs
from .cells import StudyError, results_of
from .measures import MEASURES
from .runs import Run
from .study import Study

Groups = Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]]
KEPT = ("trainable_parameters", "bytes_sent", "steps", "seconds", "versions", "machine", "command", "dataset_key")


def record(study: Study, run: Run, root: Path) -> dict[str, Any] | None:
    """A finished run as JSON takes it; None of another.

    Bits are those per parameter and step; `accuracies` is over epochs, `losses` over steps, in nats.

    Raises:
        StudyError: the run did not log what the study compares by.
    """
    results = results_of(runs.cell(study, run), root)
    if results is None:
        return None
    history, loss = results["log_history"], results.get("loss_key", "eval_loss")
    losses = [[entry.get("step"), entry[loss]] for entry in history if loss in entry]
    accuracies = [[entry["epoch"], entry["eval_accuracy"]] for entry in history if "eval_accuracy" in entry]
    for measure, needed, found in (("accuracy", "eval_accuracy", accuracies), ("loss", loss, losses)):
        if study.measure == measure and not found:
            raise StudyError(f"{root / run.folder}: its log has no {needed}. Let the script evaluate, each epoch.")
    return {
        "folder": run.folder,
        **asdict(run),
        "settings": study.settings(run.method) | {"learning_rate": run.learning_rate},
        "final_accuracy": accuracies[-1][1] if accuracies else None,
        "final_loss": losses[-1][1] if losses and math.isfinite(losses[-1][1]) else None,
        "accuracies": accuracies,
        "losses": [[step, value] for step, value in losses if math.isfinite(value)],
        "bits_sent": _bits(results, "bytes_sent"),
        "bits_received": _bits(results, "bytes_received"),
        **{key: results.get(key) for key in KEPT},
    }


def check_data(records: Sequence[Mapping[str, Any]]) -> None:
    """Raise StudyError where runs, as far as they say so, are of different data."""
    first = {one["dataset_key"]: one["folder"] for one in reversed(records) if one["dataset_key"]}
    if len(first) > 1:
        found = " and ".join(f"{folder} of data with the key {key[:8]}" for key, folder in first.items())
        raise StudyError(f"{found} cannot be compared. Move the runs of one of them away, and run them again.")


def _bits(results: Mapping[str, Any], key: str) -> float | None:
    parameter_steps = results["trainable_parameters"] * results["bytes_counted_steps"]
    count = results.get(key)
    return None if count is None or not parameter_steps else 8 * count / parameter_steps


def choose(study: Study, label: str, root: Path) -> dict[str, Any]:
    """The search of a method: what each learning rate came to, and the best; of equals, the lower loss."""
    measure = MEASURES[study.measure]
    searched = runs.search(study, label)
    found = {run.learning_rate: record(study, run, root) for run in searched}
    done = {rate: one for rate, one in found.items() if one is not None}

    def merit(rate: float) -> tuple[float, float]:
        value, loss = done[rate][measure.final], done[rate]["final_loss"]
        return -math.inf if value is None else measure.sign * value, -math.inf if loss is None else -loss

    best = max(done, key=merit) if done else None
    return {
        "runs": [run.folder for run in searched],
        "tried": [[rate, None if one is None else one[measure.final]] for rate, one in found.items()],
        "best": best,
        "at_edge": best in (searched[0].learning_rate, searched[-1].learning_rate),
    }


def runs_of(summary: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The finished runs of `ordinary` or of `attacked`, as `record` has them."""
    wanted = set(summary[part])
    return [run for run in summary["runs"] if run["folder"] in wanted]


def grouped(records: Sequence[Mapping[str, Any]], *keys: str) -> Groups:
    """Records by what they have under these keys, in order of the first of each."""
    groups = defaultdict(list)
    for one in records:
        groups[tuple(one[key] for key in keys)].append(one)
    return dict(groups)
