"""lm-eval's definitions of the seven tasks, over the hub's rows or over local files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
from datasets import Dataset, DatasetDict
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml  # what TaskManager reads a definition with

HERE = Path(__file__).parent
# In the order of the paper's table.
NAMES = ("arc_easy", "arc_challenge", "boolq", "piqa", "social_iqa", "hellaswag", "openbookqa")
TRAIN, VALIDATION, TEST = "train.jsonl", "validation.jsonl", "test.jsonl"


class TaskError(ValueError):
    """A task that does not exist, or local files that do not fit it."""


@dataclass
class LoadedTask:
    """A task with what the report says of it.

    Args:
        task: lm-eval's, with its rows.
        title: as a heading has it.
        metric: the one in the tables.
        dataset: hub id, or the task's name for local files.
        config: of the hub dataset.
        split: the one that is scored.
    """

    task: ConfigurableTask
    title: str
    metric: str
    dataset: str
    config: str | None
    split: str


def check_tasks(names: Sequence[str], data_dir: str | None) -> None:
    """Raises TaskError for what can be wrong before anything is read."""
    if unknown := [name for name in names if name not in NAMES]:
        raise TaskError(f"--tasks {' '.join(unknown)}: no such task. There are {', '.join(NAMES)}.")
    if len(set(names)) < len(names):
        raise TaskError(f"--tasks {' '.join(names)}: a task is named twice. Name each once.")
    if data_dir is None:
        return
    if not Path(data_dir).is_dir():
        raise TaskError(f"--data_dir {data_dir}: no such folder. Leave it away to take the data from the hub.")
    for name in names:
        for path in local_files(name, data_dir):
            if not path.is_file():
                raise TaskError(
                    f"--data_dir {data_dir}: no {path.relative_to(data_dir)} there, which {name} needs. Add the file, "
                    f"name other tasks with --tasks, or leave --data_dir away to take the data from the hub."
                )


def local_files(name: str, data_dir: str) -> tuple[Path, Path]:
    """The file of the shots and the scored one. lm-eval scores the test split where the hub's has answers."""
    folder = Path(data_dir) / _ours(name)["metadata"]["folder"]
    has_test = _theirs(name).get("test_split") is not None and (folder / TEST).is_file()
    return folder / TRAIN, folder / (TEST if has_test else VALIDATION)


def load_task(name: str, data_dir: str | None, num_fewshot: int, seed: int) -> LoadedTask:
    """The task with its shots chosen: the same for the same seed, whatever the model."""
    loaded = _load(name, data_dir)
    pool = len(loaded.task.sampler.df)
    if num_fewshot >= pool:  # lm-eval draws one more, to have enough where the question itself is among them
        raise TaskError(f"--num_fewshot {num_fewshot}: {name} has {pool} rows to draw from. Give a smaller number.")
    loaded.task.set_config(key="num_fewshot", value=num_fewshot)
    loaded.task.set_fewshot_seed(seed=seed)
    return loaded


def _load(name: str, data_dir: str | None) -> LoadedTask:
    ours, config = _ours(name), _theirs(name)
    said = ours["metadata"]
    scored = config.get("test_split") or config["validation_split"]
    title, metric = said["title"], said["reported_metric"]
    if data_dir is None:
        task = ConfigurableTask(config=config)
        return LoadedTask(task, title, metric, config["dataset_path"], config.get("dataset_name"), scored)
    train, evaluated = local_files(name, data_dir)
    rows = DatasetDict({config["training_split"]: _read(train, said), scored: _read(evaluated, said)})
    # Read here and not by a dataset builder: two splits of one builder must have the same fields.
    config |= ours | {"metadata": config["metadata"] | said, "custom_dataset": lambda **metadata: rows}
    task = ConfigurableTask(config=config)
    return LoadedTask(task, title, metric, name, None, evaluated.stem)


def digest(names: Sequence[str], data_dir: str) -> str:
    """Of the content of all files that the tasks read."""
    total = hashlib.sha256()
    for name in sorted(names):
        for path in local_files(name, data_dir):
            total.update(f"{name} {path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()[:16]


def _ours(name: str) -> dict[str, Any]:
    config = load_yaml(HERE / f"{name}.yaml", recursive=False)
    return {key: value for key, value in config.items() if key != "include"}


def _theirs(name: str) -> dict[str, Any]:
    included = load_yaml(HERE / f"{name}.yaml", recursive=False)["include"]
    return load_yaml(Path(lm_eval.tasks.__file__).parent / included)


def _read(path: Path, said: dict[str, Any]) -> Dataset:
    try:
        rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise TaskError(f"{path}: not JSON lines in UTF-8 ({error}).") from error
    if not rows:
        raise TaskError(f"{path}: no rows. Give at least one.")
    allowed = [said[key] for key in ("fields", "prepared_fields") if key in said]
    if not all(any(_has(row, fields) for fields in allowed) for row in rows):
        wanted = ", or ".join(" ".join(fields) for fields in allowed)
        raise TaskError(f"{path}: every row must have the fields of the hub's dataset: {wanted}.")
    try:
        return Dataset.from_list(rows)
    except (datasets.exceptions.DatasetsError, TypeError, ValueError) as error:
        raise TaskError(f"{path}: a field has values of different types ({error}). Make them the same.") from error


def _has(row: Any, fields: Sequence[str]) -> bool:
    return isinstance(row, dict) and set(fields) <= set(row)
