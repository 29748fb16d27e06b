"""Which folder counts as a checkpoint: one whose manifest fits its files, on all ranks."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist

from .manifest import ANY_PART, ELSEWHERE, CheckpointError, Manifest, check_file, has_workers

logger = logging.getLogger(__name__)

_NUMBERED = re.compile(r"(.*[-_])(\d+)")
_CHECKPOINT = re.compile(r"checkpoint[-_]\d+")


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in the folder that is whole, the same on all ranks; None if there is none.

    Of all subfolders with a manifest, whatever their names: ``checkpoint-500`` of a Trainer, accelerate's
    ``checkpoint_0``, ``epoch_1``; the newest is the one with the most steps. Those that are not whole, and those that
    are named ``checkpoint`` but have no manifest, are passed over with a warning. A collective, if torch.distributed is
    initialized.
    """
    return newest_complete(folder)[0]


def newest_complete(folder: str | Path) -> tuple[str | None, list[str]]:
    """As :func:`last_complete_checkpoint`, with what is wrong with those that were passed over, newest first."""
    found = {path.name: path for path in _subfolders(Path(folder))}
    everyone = _gather({name: step for name, path in found.items() if (step := _step_of(path)) is not None})
    # Of folders of its own, a node may lack the newest.
    common = {name: max(one[name] for one in everyone) for name in set.intersection(*map(set, everyone))}
    wrong: list[str] = []
    for name in _newest_first(common):
        why = _why_incomplete_anywhere(found[name])
        if why is None:
            return str(found[name]), wrong
        wrong.append(why)
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning("passed over: %s", why)
    return None, wrong


def _step_of(folder: Path) -> int | None:
    """Of a checkpoint; -1 where it does not say, None where it is no checkpoint."""
    try:
        return Manifest.read(folder).step
    except CheckpointError:
        return -1 if has_workers(folder) or _CHECKPOINT.fullmatch(folder.name) else None


def _newest_first(steps: dict[str, int]) -> list[str]:
    """By the steps made. One that does not say is newer than the one numbered before it."""
    ages, latest = {}, dict[str, int]()
    numbered = [(match[1], int(match[2]), name) for name in steps if (match := _NUMBERED.fullmatch(name))]
    for kind, number, name in sorted(numbered):
        latest[kind] = max(latest.get(kind, -1), steps[name])
        ages[name] = (steps[name] if steps[name] >= 0 else latest[kind], number)
    return sorted(steps, key=lambda name: (ages.get(name, (steps[name], -1)), name), reverse=True)


def check_complete(folder: str | Path) -> None:
    """Raise CheckpointError, on all ranks, unless the checkpoint is whole. A collective as the one above.

    A part that is lost may not be needed: :func:`load_workers` says whose it was, and what can be done.
    """
    why = next((why for why in _gather(why_incomplete(folder)) if why is not None), None)
    if why is not None:
        raise CheckpointError(why)


def _why_incomplete_anywhere(folder: Path) -> str | None:
    """What is wrong with the checkpoint, the same on all ranks; None if nothing."""
    why, there = why_incomplete(folder), sorted(path.name for path in folder.glob(ANY_PART))
    everyone = _gather((why, [] if why else list(Manifest.read(folder).parts), there))
    if wrong := [why for why, _, _ in everyone if why is not None]:
        return wrong[0]
    parts = everyone[0][1]
    if any(others != parts for _, others, _ in everyone):
        return f"{folder} is not of one run on all ranks: their manifests differ. {ELSEWHERE}"
    lost = set(parts) - {name for _, _, names in everyone for name in names}
    return f"{folder / min(lost)} is missing on all ranks. {ELSEWHERE}" if lost else None


def why_incomplete(folder: str | Path) -> str | None:
    """What is wrong with the checkpoint, as far as this process looks at it; None if nothing.

    With a process group, the processes of a node share the files out among themselves; parts of workers on other nodes
    may be absent.
    """
    folder = Path(folder)
    rank, size = 0, 1
    if dist.is_initialized():
        rank, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    try:
        manifest = Manifest.read(folder)
        for index, (name, entry) in enumerate(sorted(manifest.files.items())):
            if index % size == rank and (name not in manifest.parts or (folder / name).exists()):
                check_file(folder, name, entry)
    except CheckpointError as error:
        return str(error)
    return None


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
