"""The manifest of a checkpoint: which files it is made of, each with size and hash.

Everything is written under a temporary name, flushed to disk, and renamed; the manifest last. A folder whose manifest
is missing, or does not fit the files that a run goes on from, is no checkpoint. Other files (configuration, tokenizer,
README) may change, and more may come, after it was written: a callback may want to.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ..optim.replica import STEP

MANIFEST = "hf_dlion_manifest.json"
TEMPORARY = ".hf_dlion_part"
ANY_PART = "worker_*_of_*.safetensors"
ELSEWHERE = "Resume from another checkpoint."

_TRAINER_STATE = "trainer_state.json"
_SCHEDULER = ("scheduler.pt", "scheduler.bin")
_OPTIMIZER = ("optimizer.pt", "optimizer.bin")
_STATE = (".safetensors", ".bin", ".pt", ".pth", ".pkl", ".distcp", ".metadata", ".index.json")
"""Ends of the names of files that a run goes on from: weights, states of workers, schedulers and generators."""

_FORMAT = 2
_MAX_MANIFEST_BYTES = 1 << 26
_CHUNK = 1 << 22


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, is not whole, or does not fit; the message says what to do instead."""


@dataclass(frozen=True)
class Entry:
    """A file of the checkpoint: its bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is made of.

    Attributes:
        method: class of the optimizer.
        options: of the optimizer.
        workers: how many it has.
        step: how many it has made.
        groups: its param groups, with the number of their parameters as ``params``.
        parts: the files of the workers' states, by rank, and then by shard.
        files: every file, by its path in the folder.
        shards: over how many ranks each worker's replica was sharded.
    """

    method: str
    options: dict[str, Any]
    workers: int
    step: int
    groups: list[dict[str, Any]]
    parts: list[str]
    files: dict[str, Entry]
    format: int = _FORMAT
    shards: int = 1

    def write(self, folder: Path) -> None:
        """Into the folder, as the last of its files."""
        content = asdict(self)
        if self.shards == 1:
            del content["shards"]  # so that versions without shards can read it
        sealed = {**content, "sha256": _hash(content)}
        write_whole(folder / MANIFEST, lambda part: part.write_text(json.dumps(sealed, indent=1), encoding="utf-8"))

    def parts_of(self, worker: int) -> list[str]:
        """The files of a worker's state, by shard."""
        return [part_name(worker, self.workers, shard, self.shards) for shard in range(self.shards)]

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """From the folder.

        Raises:
            CheckpointError: there is none, or it is not one that was written here.
        """
        path = folder / MANIFEST
        try:
            if path.stat().st_size > _MAX_MANIFEST_BYTES:
                raise CheckpointError(f"{path} is too large for a manifest. {ELSEWHERE}")
            found = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(_why_no_manifest(folder)) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}). {ELSEWHERE}") from error
        try:
            return cls._checked(found)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not a manifest of this version ({error}). {ELSEWHERE}") from error

    @classmethod
    def _checked(cls, found: Any) -> Manifest:
        if found["format"] not in (1, _FORMAT):
            raise ValueError(f"format {found['format']!r}, and not {_FORMAT}")
        if found.pop("sha256") != _hash(found):
            raise ValueError("its own hash differs")
        if found["format"] == 1:
            found = _from_format_1(found)
        files = {name: Entry(**entry) for name, entry in found["files"].items()}
        for name, entry in files.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or "\\" in name or str(path) != name or "\0" in name:
                raise ValueError(f"{name!r} is no path inside of a folder")
            if type(entry.size) is not int or entry.size < 0 or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
                raise ValueError(f"{name!r} has no size and hash")
        manifest = cls(**{**found, "files": files})
        if any(type(one) is not int for one in (manifest.workers, manifest.shards, manifest.step)) or manifest.step < 0:
            raise ValueError("workers and step are not numbers")
        if not 0 < manifest.workers * manifest.shards == len(manifest.parts) or manifest.workers < 0:
            raise ValueError("there is not one part for each worker")
        if manifest.parts != [name for worker in range(manifest.workers) for name in manifest.parts_of(worker)]:
            raise ValueError("the names of the parts are others")
        if not files.keys() >= set(manifest.parts):
            raise ValueError("there is not one part for each worker")
        if not isinstance(manifest.method, str) or not isinstance(manifest.options, dict):
            raise ValueError("method and options are not there")
        for group in manifest.groups:
            if type(group["params"]) is not int or type(group[STEP]) is not int or group[STEP] < 0:
                raise ValueError("a param group without parameters or step")
        return manifest


def has_workers(folder: str | Path) -> bool:
    """Whether there is anything of our workers in it, whole or not."""
    return (Path(folder) / MANIFEST).exists() or any(Path(folder).glob(ANY_PART))


def written_by_others(folder: str | Path, wanted: str, written: str = "an optimizer of hf_dlion") -> str:
    """What is wrong where a checkpoint of one optimizer is to be resumed from by another."""
    return (
        f"{folder} was written by {written}, whose state is not that of {wanted}. Go on with the same method, or "
        f"begin anew from the model in it: from_pretrained({str(folder)!r}), and no resume_from_checkpoint."
    )


def _why_no_manifest(folder: Path) -> str:
    """From what else is there."""
    if not folder.is_dir():
        return f"{folder} is no folder. {ELSEWHERE}"
    there = {path.name for path in folder.iterdir()}
    anew = f"Begin anew from it: from_pretrained({str(folder)!r}), and no resume_from_checkpoint."
    if not has_workers(folder) and there.intersection(_OPTIMIZER):
        return (
            f"{folder} has no {MANIFEST} and no worker's state, but {min(there.intersection(_OPTIMIZER))}: it is of a "
            f"run with another optimizer, or was written without save_workers. The model in it is all that can be "
            f"used. {anew}"
        )
    if not has_workers(folder) and _TRAINER_STATE in there and not there.intersection(_SCHEDULER):
        return (
            f"{folder} has no {MANIFEST}, no worker's state and no scheduler: only the model was saved "
            f"(save_only_model=True), and a run cannot go on from that. {anew}"
        )
    return f"{folder} has no {MANIFEST}: its writing was interrupted, or hf_dlion did not write it. {ELSEWHERE}"


def may_change(name: str) -> bool:
    """Whether a run does not go on from this file, so that it may be edited after the checkpoint was written."""
    base = PurePosixPath(name).name
    return base == "training_args.bin" or not (base == _TRAINER_STATE or base.endswith(_STATE))


def _from_format_1(found: dict[str, Any]) -> dict[str, Any]:
    """With the names of today."""
    options = dict(found["settings"])
    if "check_replicas_every" in options:
        options["check_replicas_steps"] = options.pop("check_replicas_every")
    kept = {name: value for name, value in found.items() if name != "settings"}
    return kept | {"options": options, "format": _FORMAT}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def part_name(rank: int, workers: int, shard: int = 0, shards: int = 1) -> str:
    """The file of a worker's state, or of one of its shards."""
    of_shard = f"_shard_{shard:05d}_of_{shards:05d}" if shards > 1 else ""
    return f"worker_{rank:05d}_of_{workers:05d}{of_shard}.safetensors"


def check_file(folder: Path, name: str, entry: Entry) -> None:
    """Raise CheckpointError unless the file is there, and is what was written or may change."""
    path = folder / name
    if not os.path.isfile(path):  # False for a name that no file can have
        raise CheckpointError(
            f"{path} is missing. Put it back (each node needs the parts of its own ranks, and with another number of "
            "workers the parts of all), take resume_world_size_policy reset to start it at zero with another number of "
            "workers, or resume from another checkpoint."
        )
    if may_change(name):
        return
    try:
        found = entry_of(path) if path.stat().st_size == entry.size else None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {ELSEWHERE}") from error
    if found != entry:
        raise CheckpointError(
            f"{path} is not what was written: its size or hash differs. A run goes on from this file, so it may not "
            "change (configuration, tokenizer and text files may). Where a callback changes it on purpose, let it call "
            f"save_workers(folder, trainer.optimizer) afterwards, on all ranks. {ELSEWHERE}"
        )


def entry_of(path: Path, flush: bool = False) -> Entry:
    """Of a file as it is now, which is flushed to disk first if asked for."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        if flush:
            os.fsync(file.fileno())
        return Entry(os.fstat(file.fileno()).st_size, digest.hexdigest())


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Under a temporary name, flushed to disk, and renamed; nothing is left where that fails."""
    part = path.with_name(f"{TEMPORARY}_{path.name}")
    try:
        write(part)
        _flush(part)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
