"""How values from a YAML file are checked; every message says what was given, and what is taken."""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .cells import StudyError


def mapping(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise StudyError(f"{name} is a {type(given).__name__}; it must be lines of 'name: value'.")
    return dict(given)


def fields_of(kind: type, given: Any, name: str) -> dict[str, Any]:
    """What is given for a dataclass, with no key that it does not know and all that it needs."""
    known = {entry.name: entry for entry in fields(kind)}
    given = mapping(given, name)
    if unknown := [str(key) for key in given if key not in known]:
        raise StudyError(f"{name} has {', '.join(unknown)}, which is not known; it takes {', '.join(known)}.")
    needed = [key for key, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING]
    if missing := [key for key in needed if key not in given]:
        raise StudyError(f"{name} lacks {', '.join(missing)}.")
    return given


def check_counts(name: str, values: Any, least: int = 0) -> None:
    if not isinstance(values, list) or not values or not all(type(value) is int and value >= least for value in values):
        raise StudyError(f"{name}={values!r} is not a list of numbers from {least} on; write [1, 2], say.")


def check_rates(name: str, values: Any) -> None:
    """At least two different numbers: one alone is no search."""
    if not isinstance(values, list) or len(set(values)) < 2 or not all(map(is_positive, values)):
        raise StudyError(f"{name}={values} is not a search; give at least two different numbers above 0.")


def check_file(name: str, path: str) -> None:
    if not Path(path).is_file():
        raise StudyError(f"{name}: there is no {path}; its path is from where the command is run.")


def number(value: Any) -> float | None:
    """YAML takes 1e-4 for text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def is_positive(value: Any) -> bool:
    return (number(value) or 0) > 0


def text_or_file(name: str, given: str, folder: Path) -> str:
    """A text, or what is in the Markdown file of that name."""
    if not given.strip().endswith(".md"):
        return given
    try:
        return (folder / given.strip()).read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"{name}: {given} cannot be read ({error}). Give a file beside the study, or the text."
        ) from error
