"""Arguments of the scripts that train: dataclasses, a recipe in YAML, and the command line, which wins."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
import yaml
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from hf_dlion import DLionTrainingArguments, last_complete_checkpoint

from .errors import ArgumentsError

TRAINER_STATE = "trainer_state.json"

if int(transformers.__version__.partition(".")[0]) < 5:
    raise ImportError(
        f"transformers {transformers.__version__}: the package works with it, but its examples, whose warm-up is a "
        "share of the steps, need transformers 5. Install that, or start from examples/minimal_loop.py."
    )


def parse_arguments(dataclasses: Sequence[type], doc: str | None, defaults: dict[str, Any]) -> tuple[Any, ...]:
    """One object a dataclass, from `--config` and the command line; `defaults` are the script's own."""
    parser = HfArgumentParser(list(dataclasses), description=(doc or "").partition("\n")[0])
    parser.set_defaults(**defaults)
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--config")
    recipe = recipe_parser.parse_known_args()[0].config
    if recipe is not None:
        choices = {action.dest: action.choices or () for action in parser._actions if action.dest != "help"}
        given = _read_recipe(recipe, set(choices))
        # YAML takes a bare no for false.
        parser.set_defaults(
            **{name: "no" if value is False and "no" in choices[name] else value for name, value in given.items()}
        )
    return tuple(parser.parse_args_into_dataclasses(look_for_args_file=False))


def _read_recipe(path: str, known: set[str]) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArgumentsError(f"--config {path}: cannot be read as YAML ({error}).") from error
    if not isinstance(recipe, dict):
        found = type(recipe).__name__
        raise ArgumentsError(f"--config {path}: expected lines of 'name: value', found a {found}.")
    if unknown := set(recipe) - known:
        names = ", ".join(sorted(map(str, unknown)))
        raise ArgumentsError(f"--config {path}: no such argument: {names}. See --help for those there are.")
    return recipe


def checkpoint_to_resume(args: DLionTrainingArguments) -> str | None:
    wanted: str | None = args.resume_from_checkpoint
    if wanted is None:
        return None
    folder = str(args.output_dir)
    if wanted == "auto":
        if args.votes:
            return last_complete_checkpoint(folder)
        newest: str | None = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        return newest
    if not (Path(wanted) / TRAINER_STATE).is_file():
        raise ArgumentsError(
            f"--resume_from_checkpoint {wanted}: no checkpoint there (no {TRAINER_STATE}). Give the path "
            f"of a checkpoint-... folder, or 'auto' for the newest one in {folder}."
        )
    return wanted
