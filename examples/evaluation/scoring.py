"""Scores of a model on the tasks."""

from typing import Any

from lm_eval.evaluator import evaluate

from .shared_model import SharedModel
from .tasks_3shot.definitions import LoadedTask


def score(model: SharedModel, tasks: dict[str, LoadedTask], limit: int | None) -> dict[str, Any]:
    """lm-eval's numbers, by task, all metrics; the one for the tables as `value` and `stderr`.

    `limit` is how many rows of every task are scored; None is all.
    """
    chosen: Any = {"tasks": {name: loaded.task for name, loaded in tasks.items()}, "groups": {}}
    outcome: Any = evaluate(lm=model, task_dict=chosen, limit=limit, log_samples=False)
    scores = {}
    for name, loaded in tasks.items():
        row = outcome["results"][name]
        metrics = {}
        for key in row:
            metric, _, rest = key.partition(",")
            if rest and not metric.endswith("_stderr"):
                error = row.get(f"{metric}_stderr,{rest}")
                metrics[metric] = {"value": row[key], "stderr": error if isinstance(error, float) else None}
        scores[name] = {
            "alias": loaded.title,
            "metric": loaded.metric,
            **metrics[loaded.metric],
            "n": outcome["n-samples"][name]["effective"],
            "metrics": metrics,
            "dataset": loaded.dataset,
            "config": loaded.config,
            "split": loaded.split,
        }
    return scores
