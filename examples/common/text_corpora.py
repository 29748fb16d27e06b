"""Where the documents of a pretraining run come from, and which of them are kept for validation.

- `stdlib`: whole files are kept, chosen by a hash of the path;
- text files: the last lines of every file are kept;
- JSONL and hub datasets: documents are kept, chosen by a hash of their text, so duplicates stay together.
"""

import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets

from .errors import DataError, reason

EMBEDDED = "stdlib"

CACHE_FORMAT = "1"  # part of every key: raise it when the cached files, or the way to them, change
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson")

# Tests and their data, tables made by programs, other people's packages.
_STDLIB_EXCLUDED = {
    *("site-packages", "dist-packages", "_vendor", "_bundled", "_distutils_hack"),
    *("test", "tests", "idle_test"),
    *("__pycache__", "encodings", "pydoc_data", "lib-dynload"),
}
_STDLIB_MIN_FILES = 100


class Document(NamedTuple):
    text: str
    held_out: bool
    """True for validation."""


@dataclass(frozen=True)
class Corpus:
    name: str
    key: str
    """Hash of the content and of the split."""
    documents: Callable[[], Iterator[Document]]


def is_local(dataset: str) -> bool:
    """Whether this names something on this machine. Raises where it was clearly meant to and is not there."""
    path = Path(dataset)
    if path.exists():
        return True
    looks_local = path.is_absolute() or dataset.startswith((".", "~")) or dataset.count("/") > 1
    if looks_local or path.suffix in (*TEXT_SUFFIXES, *JSONL_SUFFIXES):
        raise DataError(
            f"--dataset {dataset}: no such file or folder, seen from {Path.cwd()}. Give a text file, a JSONL "
            f"file, a folder of such files, a hub id such as Skylion007/openwebtext, or '{EMBEDDED}'."
        )
    return False


def share(key: str) -> float:
    """A number in [0, 1) that depends on nothing but the key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest(), "big") / 2**48


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join((CACHE_FORMAT, *parts)).encode()).hexdigest()


def standard_library(validation_fraction: float) -> Corpus:
    """The source of Python's standard library: megabytes of code and English that Python brings along."""
    root = Path(sysconfig.get_path("stdlib"))
    files = [relative for path in sorted(root.rglob("*.py")) if _wanted(relative := path.relative_to(root))]
    if len(files) < _STDLIB_MIN_FILES:
        raise DataError(
            f"--dataset {EMBEDDED}: {root} has only {len(files)} Python files; this Python comes without the "
            "source of its standard library, or with it in an archive. Give --dataset a text file, a JSONL "
            "file, a folder or a hub id."
        )

    def documents() -> Iterator[Document]:
        for relative in files:
            try:
                text = (root / relative).read_text(encoding="utf-8")
            except UnicodeDecodeError:  # a few old files declare another encoding
                continue
            if text.strip():
                yield Document(text, held_out=share(relative.as_posix()) < validation_fraction)

    return _hashed(EMBEDDED, documents)


def _wanted(relative: Path) -> bool:
    generated = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
    return not generated and _STDLIB_EXCLUDED.isdisjoint(relative.parts)


def local_files(path: Path, text_column: str, validation_fraction: float) -> Corpus:
    """A text file, a JSONL file, or all of them in a folder and below."""
    files = files_in(path, (*TEXT_SUFFIXES, *JSONL_SUFFIXES)) if path.is_dir() else [path]

    def documents() -> Iterator[Document]:
        for file in files:
            if file.suffix in JSONL_SUFFIXES:
                yield from _jsonl_documents(file, text_column, validation_fraction)
            else:
                yield from _text_documents(file, validation_fraction)

    return _hashed(str(path), documents)


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    files = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    if not files:
        raise DataError(f"--dataset {folder}: no file in this folder ends in {', '.join(suffixes)}.")
    return files


def _hashed(name: str, documents: Callable[[], Iterator[Document]]) -> Corpus:
    content, count = hashlib.sha256(), 0
    for document in documents():
        encoded = document.text.encode()
        content.update(b"%d %d " % (document.held_out, len(encoded)))
        content.update(encoded)
        count += 1
    if not count:
        raise DataError(f"--dataset {name}: there is no text in it, only white space or nothing at all.")
    return Corpus(name, digest(content.hexdigest()), documents)


def _text_documents(file: Path, validation_fraction: float) -> Iterator[Document]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"--dataset: {file} is not UTF-8 text ({error}). Convert it, or leave it out.") from error
    wanted = int(len(text) * (1 - validation_fraction))
    next_line = text.find("\n", wanted) + 1
    # Without a line that begins behind that, the last line is cut.
    cut = next_line if text[next_line:].strip() and next_line else wanted
    for part, held_out in ((text[:cut], False), (text[cut:], True)):
        if part.strip():
            yield Document(part, held_out)


def _jsonl_documents(file: Path, text_column: str, validation_fraction: float) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"--dataset: {where} is not JSON ({error}). JSONL has one object a line; plain text goes "
                    f"into a file ending in {TEXT_SUFFIXES[0]}."
                ) from error
            if not isinstance(row, dict):
                raise DataError(f"--dataset: {where} is a {type(row).__name__}, not an object with a text field.")
            text = text_of(row, text_column, where)
            if text.strip():
                yield Document(text, held_out=share(text) < validation_fraction)


def text_of(row: dict[str, Any], text_column: str, where: str) -> str:
    if text_column not in row:
        there = ", ".join(row) or "none"
        raise DataError(f"--text_column {text_column}: {where} has no such field. The fields are: {there}.")
    text = row[text_column]
    if not isinstance(text, str):
        raise DataError(
            f"--text_column {text_column}: in {where} its value is of type {type(text).__name__}, not text."
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half a surrogate pair
        raise DataError(f"--text_column {text_column}: {where} is not valid Unicode ({error}).") from error
    return text


def hub_dataset(dataset: str, dataset_config: str | None, text_column: str, validation_fraction: float) -> Corpus:
    """The train split of a hub dataset, downloaded."""
    loaded = _load_from_hub(dataset, dataset_config, streaming=False)
    if text_column not in loaded.column_names:
        there = ", ".join(loaded.column_names)
        raise DataError(f"--text_column {text_column}: {dataset} has no such column. The columns are: {there}.")

    def documents() -> Iterator[Document]:
        for number, row in enumerate(loaded.select_columns([text_column]), start=1):
            text = text_of(row, text_column, f"{dataset}, row {number}")
            if text.strip():
                yield Document(text, held_out=share(text) < validation_fraction)

    # `datasets` has a name for the content: to hash a corpus of this size here would be to read it once more.
    key = digest(dataset, loaded._fingerprint, text_column, str(validation_fraction))
    return Corpus(dataset, key, documents)


def open_stream(dataset: str, dataset_config: str | None, text_column: str) -> datasets.IterableDataset:
    """A hub dataset or JSONL files, read as they are used, with the text column only."""
    if dataset != EMBEDDED and not is_local(dataset):
        stream = _load_from_hub(dataset, dataset_config, streaming=True)
    else:
        path = Path(dataset)
        if path.suffix not in JSONL_SUFFIXES and not path.is_dir():
            raise DataError(
                f"--streaming with --dataset {dataset}: streams are for hub datasets and JSONL files. Leave "
                "--streaming away: this dataset is tokenised once and cached."
            )
        files = files_in(path, JSONL_SUFFIXES) if path.is_dir() else [path]
        stream = datasets.load_dataset("json", data_files=[str(f) for f in files], split="train", streaming=True)
    first = next(iter(stream), None)
    if first is None:
        raise DataError(f"--dataset {dataset}: the stream has no documents.")
    text_of(first, text_column, f"the first document of {dataset}")
    selected: datasets.IterableDataset = stream.select_columns([text_column])
    return selected


def _load_from_hub(dataset: str, dataset_config: str | None, streaming: bool) -> Any:
    try:
        return datasets.load_dataset(dataset, dataset_config, split="train", streaming=streaming)
    except Exception as error:  # the hub's client has a different class for each of the many ways to fail
        raise DataError(
            f"--dataset {dataset}: no file or folder of that name here, and loading it from the hub failed: "
            f"{reason(error)}. Give a path, a hub id whose 'train' split can be loaded from here, or "
            f"'{EMBEDDED}', which needs no network."
        ) from error
