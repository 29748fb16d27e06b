"""Rows of instruction, input and output, from a JSON or JSONL file or from the hub."""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from .errors import DataError, reason

FIELDS = ("instruction", "input", "output")
_LOCAL_SUFFIXES = (".json", ".jsonl", ".ndjson")


class Row(NamedTuple):
    instruction: str
    input: str
    output: str


def read_rows(
    dataset: str, dataset_config: str | None, main_process_first: Callable[[], AbstractContextManager[Any]]
) -> list[Row]:
    """The rows of a JSON or JSONL file, or of the train split of a hub dataset."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return [_row(found, where) for where, found in _json_rows(path)]
    if path.is_dir() or looks_local(dataset) or path.suffix in _LOCAL_SUFFIXES:
        what = "is a folder" if path.is_dir() else f"no such file, seen from {Path.cwd()}"
        raise DataError(
            f"--dataset {dataset}: {what}. Give a JSON file (a list of rows), a JSONL file (a row a line), or a hub "
            "id such as tatsu-lab/alpaca."
        )
    with main_process_first():
        loaded = _from_hub(dataset, dataset_config)
    return [_row(found, f"{dataset}, row {number}") for number, found in enumerate(loaded, start=1)]


def looks_local(name: str) -> bool:
    """Whether this can only be a path: hub ids have one slash at most, between two names."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--dataset {path}: cannot be read as UTF-8 text ({error}).") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(f"--dataset {path}: begins like a JSON list and is none ({error}).") from error
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(
                f"--dataset: {where} is not JSON ({error}). Give a JSON list of rows, or one row a line."
            ) from error


def _from_hub(dataset: str, dataset_config: str | None) -> Any:
    try:
        return datasets.load_dataset(dataset, dataset_config, split="train")
    except Exception as error:  # the hub's client has a different class for each of the many ways to fail
        raise DataError(
            f"--dataset {dataset}: no file of that name here, and loading it from the hub failed: {reason(error)}. "
            "Give a JSON or JSONL file, or a hub id whose 'train' split can be loaded from here."
        ) from error


def _row(found: Any, where: str) -> Row:
    if not isinstance(found, dict):
        raise DataError(f"--dataset: {where} is a {type(found).__name__}, not an object with {', '.join(FIELDS)}.")
    if missing := [name for name in FIELDS if name not in found]:
        raise DataError(
            f"--dataset: {where} has no field {', '.join(map(repr, missing))}. The fields are: "
            f"{', '.join(map(str, found)) or 'none'}; needed are {', '.join(FIELDS)} (an input may be empty)."
        )
    values = ["" if found[name] is None and name != "instruction" else found[name] for name in FIELDS]
    for name, value in zip(FIELDS, values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"--dataset: in {where} {name!r} is of type {type(value).__name__}, not text.")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half a surrogate pair
            raise DataError(f"--dataset: in {where} {name!r} is not valid Unicode ({error}).") from error
    return Row(*values)
