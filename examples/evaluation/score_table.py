"""Tables of `evaluate_3shot.py`: one run, several runs side by side, and a model card's section."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

SECTION = "## Evaluation"
MUST_AGREE = {
    "num_fewshot": "--num_fewshot",
    "limit": "--limit",
    "seed": "--seed",
    "tasks": "the tasks",
    "metrics": "the metrics",
    "data": "the data",
}


class ResultsError(ValueError):
    """Results that are not there or do not go together."""


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def with_error(entry: dict[str, Any], text: str | None = None) -> str:
    shown = percent(entry["value"]) if text is None else text
    return shown if entry["stderr"] is None else f"{shown} ± {percent(entry['stderr'])}"


def average(tasks: dict[str, Any]) -> dict[str, Any]:
    """The mean over the tasks, every task the same weight. Its error takes the tasks' errors as independent."""
    errors = [entry["stderr"] for entry in tasks.values()]
    unknown = any(error is None for error in errors)
    return {
        "value": sum(entry["value"] for entry in tasks.values()) / len(tasks),
        "stderr": None if unknown else math.sqrt(sum(error**2 for error in errors)) / len(tasks),
    }


def setting(results: dict[str, Any]) -> str:
    """`3-shot`, or `3-shot, first 100 rows`."""
    shots, limit = results["num_fewshot"], results["limit"]
    return f"{shots}-shot" if limit is None else f"{shots}-shot, first {limit} row{'s'[: limit != 1]}"


def run_table(results: dict[str, Any]) -> str:
    lines = ["| task | score | metric | rows |", "| --- | ---: | --- | ---: |"]
    for entry in results["tasks"].values():
        lines.append(f"| {entry['alias']} | {with_error(entry)} | {entry['metric']} | {entry['n']} |")
    lines.append(f"| average | {with_error(results['average'])} | | |")
    return "\n".join([*lines, "", footer(results)])


def footer(results: dict[str, Any]) -> str:
    data = "the hub's data" if results["data"]["source"] == "hub" else "local files"
    said = f"Percent ± standard error; {setting(results)}, {data}, lm-eval {results['versions']['lm_eval']}."
    return f"{said} {cut(results)}".rstrip()


def cut(results: dict[str, Any]) -> str:
    """A sentence on prompts that did not fit, which have fewer shots than the title says; nothing if all did."""
    count = results.get("truncated_requests")
    if not count:
        return ""
    return f"{count} of {results['requests']} prompts were cut at the start, to {results['max_length']} tokens."


def read_results(folders: Sequence[str], num_fewshot: int) -> dict[str, dict[str, Any]]:
    """Results by label. A folder's label is its name, or the path as given where names repeat."""
    if len(folders) < 2:
        raise ResultsError(f"--compare {' '.join(folders)}: one run only. Give the folders of two or more.")
    if len(set(folders)) < len(folders):
        raise ResultsError(f"--compare {' '.join(folders)}: a folder is named twice. Name each once.")
    names = [Path(folder).resolve().name for folder in folders]
    labels = [name if names.count(name) == 1 else folder for name, folder in zip(names, folders, strict=True)]
    runs = {}
    for label, folder in zip(labels, folders, strict=True):
        path = Path(folder) / f"{num_fewshot}shot.json"
        if not path.is_file():
            raise ResultsError(
                f"--compare {folder}: no {path.name} there. Run evaluate_3shot.py --num_fewshot {num_fewshot} with "
                f"--output_dir {folder} first, or compare another --num_fewshot."
            )
        try:
            runs[label] = json.loads(path.read_text(encoding="utf-8"))
            _settings(runs[label])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ResultsError(f"--compare {folder}: {path.name} is not a result of evaluate_3shot.py.") from error
    _check_agreement(runs)
    return runs


def _settings(results: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for numbers to stand in one table."""
    data, shots = results["data"], results["num_fewshot"]
    tasks: dict[str, Any] = results["tasks"]
    return {
        "num_fewshot": shots,
        "limit": results["limit"],
        "seed": results["seed"] if shots else None,  # it draws the shots, and nothing else
        "tasks": sorted(tasks),
        "metrics": {name: entry["metric"] for name, entry in sorted(tasks.items())},
        "data": {"source": data["source"], "digest": data.get("digest")},
    }


def _check_agreement(runs: dict[str, dict[str, Any]]) -> None:
    (first, results), *others = runs.items()
    expected = _settings(results)
    for label, other in others:
        for key, value in _settings(other).items():
            if value != expected[key]:
                raise ResultsError(
                    f"--compare: {MUST_AGREE[key]} of {first} and {label} differ ({_short(expected[key])}; "
                    f"{_short(value)}). Evaluate both in the same way."
                )


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
    return ", ".join(value) if isinstance(value, list) else str(value)


def comparison_table(runs: dict[str, dict[str, Any]]) -> str:
    """A row a run, a column a task and the average; the best bold, the second underlined."""
    first = next(iter(runs.values()))
    columns = [[results["tasks"][name] for results in runs.values()] for name in first["tasks"]]
    columns.append([results["average"] for results in runs.values()])
    titles = [entry["alias"] for entry in first["tasks"].values()]
    marked = [_mark(column) for column in columns]
    lines = [f"| run | {' | '.join([*titles, 'average'])} |", f"| --- |{' ---: |' * len(columns)}"]
    for row, label in enumerate(runs):
        lines.append(f"| {label} | {' | '.join(column[row] for column in marked)} |")
    said = {label: cut(results) for label, results in runs.items()}
    alike = len(set(said.values())) == 1
    each = [] if alike else [f"{label}: {sentence}" for label, sentence in said.items() if sentence]
    last = " ".join([footer(first if alike else first | {"truncated_requests": 0}), *each])
    return "\n".join([*lines, "", f"Best **bold**, second <u>underlined</u>. {last}"])


def _mark(column: Sequence[dict[str, Any]]) -> list[str]:
    # By the numbers as they are shown: equal ones share a mark, and the second is the next number below the best.
    shown = [percent(entry["value"]) for entry in column]
    ranked = sorted(set(shown), key=float, reverse=True)
    forms = dict(zip(ranked, ("**{}**", "<u>{}</u>"), strict=False))
    return [with_error(entry, forms.get(text, "{}").format(text)) for entry, text in zip(column, shown, strict=True)]


def model_index_results(results: dict[str, Any]) -> list[EvalResult]:
    """For a model card's metadata. Shots and limit are in the metric's name: an entry of the index has no field."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=entry["dataset"],
            dataset_name=entry["alias"],
            dataset_config=entry["config"],
            dataset_split=entry["split"],
            metric_type=entry["metric"],
            metric_name=f"{entry['metric']}, {setting(results)}",
            metric_value=round(100 * entry["value"], 2),
        )
        for entry in results["tasks"].values()
    ]


def update_model_card(path: Path, results: dict[str, Any]) -> None:
    """Puts the results in the card's metadata and table, in place of those of an earlier run of the same kind."""
    card = ModelCard.load(path)
    new = model_index_results(results)
    kept = [old for old in card.data.eval_results or [] if not any(_same_place(old, result) for result in new)]
    card.data.model_name = card.data.model_name or path.resolve().parent.name
    card.data.eval_results = kept + new
    card.text = _with_section(card.text, results)
    card.save(path)


def _same_place(old: EvalResult, new: EvalResult) -> bool:
    places = [(r.unique_identifier, r.metric_type, r.metric_name) for r in (old, new)]
    return places[0] == places[1]


def _with_section(text: str, results: dict[str, Any]) -> str:
    """The text with this run's table in its section: in place of the one before, or at the section's end."""
    start, end = (f"<!-- {mark}{setting(results)} by evaluate_3shot.py -->" for mark in ("", "/"))
    block = f"{start}\n{run_table(results)}\n{end}"
    before, found, rest = text.partition(start)
    if found and end in rest:
        return before + block + rest.partition(end)[2]
    heading = re.search(rf"^{SECTION}\s*$", text, re.MULTILINE)
    if heading is None:
        return f"{text.rstrip()}\n\n{SECTION}\n\n{block}\n"
    following = re.search(r"^#{1,2} ", text[heading.end() :], re.MULTILINE)
    cut = heading.end() + following.start() if following else len(text)
    return f"{text[:cut].rstrip()}\n\n{block}\n\n{text[cut:]}".rstrip() + "\n"
