"""Checkpoints with the state of every worker, that are whole or do not count.

Beside what others write into a folder, each worker writes its own state, and then a manifest is written that names
every file of the folder with size and hash (``manifest``).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from ..optim.agreement import digest
from ..optim.virtual import VirtualWorkers
from ..optim.workers import STEP, WorkersOptimizer
from ..wire.collectives import ProcessChannel
from ..wire.ledger import Ledger
from ..wire.local import LocalWorker
from .manifest import (
    ANY_PART,
    ELSEWHERE,
    MANIFEST,
    TEMPORARY,
    CheckpointError,
    Entry,
    Manifest,
    check_file,
    entry_of,
    part_name,
    write_whole,
)

logger = logging.getLogger(__name__)

OTHER_WORKERS = ("mean", "reset", "error")

SCALER = "gradient_scaler"
"""Of a part with fp16: the worker's own scale, and how many steps it has lasted."""

_LARGEST = 1e38  # of a hyperparameter: float32 has it

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def save_workers(folder: str | Path, optimizer: Optimizer, *, seals: bool | None = None) -> None:
    """Write every worker's state into the folder, and the manifest. A collective over the workers.

    In a loop of your own, after all else has been written on all ranks: after ``accelerator.save_state(folder)``.

    Args:
        folder: exists; with several nodes, shared by them, or one on each.
        optimizer: of this package, as it is or prepared by accelerate, with whose gradient scaler its worker's is kept.
        seals: whether this rank writes the manifest; by default rank 0 does. One rank of each folder.

    Raises:
        CheckpointError: a rank could not write; raised on all ranks. Where it could not, the folder has no manifest.
    """
    folder = Path(folder)
    members = _members(optimizer)
    first, workers, scaler = members[0], members[0].workers, _scaler_of(optimizer)
    seals = first.rank == 0 if seals is None else seals
    unseal(folder, seals)

    def write() -> dict[str, Entry]:
        written = {}
        for member in members:
            name = part_name(member.rank, workers)
            tensors = {_key(*place): tensor.contiguous() for place, tensor in _state_of(member)}
            if scaler is not None:
                state = scaler.state_dict()
                tensors[SCALER] = torch.tensor([state["scale"], state["_growth_tracker"]], dtype=torch.float32)
            write_whole(folder / name, lambda part, tensors=tensors: save_file(tensors, part))  # type: ignore[misc]
            written[name] = entry_of(folder / name)
        return written

    parts: dict[str, Entry] = {}
    for one in _on_all_ranks(members, write, f"could not write into {folder}"):
        parts |= one

    def seal() -> None:
        if seals:
            for stale in set(folder.glob(ANY_PART)) - {folder / name for name in parts}:
                stale.unlink()
            names = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
            local = {path.relative_to(folder).as_posix(): path for path in names if not path.name.startswith(TEMPORARY)}
            files = {name: parts.get(name) or entry_of(path, flush=True) for name, path in local.items()}
            Manifest(
                method=type(first).__name__,
                settings=first.options(),
                workers=workers,
                step=first.param_groups[0][STEP],
                groups=[_plain(group) for group in first.param_groups],
                parts=sorted(parts),
                files=parts | files,
            ).write(folder)

    _on_all_ranks(members, seal, f"could not write the manifest of {folder}")
    if not (folder / MANIFEST).exists():
        logger.warning(
            "%s has no manifest on the machine of rank %d, and does not count there. Let the machines share the "
            "folder, or let a rank of each seal it: --save_on_each_node, or the argument `seals`.", folder, first.rank,
        )  # fmt: skip


def unseal(folder: str | Path, seals: bool) -> None:
    """Remove the manifest before the folder is written into again, on the rank that writes it."""
    if seals:
        (Path(folder) / MANIFEST).unlink(missing_ok=True)


def load_workers(folder: str | Path, optimizer: Optimizer, *, other_workers: str = "mean") -> None:
    """Load what :func:`save_workers` wrote. A collective over the workers.

    In a loop of your own, after ``accelerator.load_state(folder)``. With as many workers as wrote it, each has its own
    state again. Otherwise, what a worker keeps for itself (momentum, residual) becomes what ``other_workers`` says; the
    mean is taken tensor by tensor, so that no more than two of a parameter's size are held beside the state. Gradient
    scalers then all start from that of rank 0.

    Args:
        folder: of the checkpoint.
        optimizer: of this package, as it is or prepared by accelerate, for the same parameters.
        other_workers: with another number of workers than wrote it: ``"mean"``, all have the mean of the old ones';
            ``"reset"``, zeros; or ``"error"``.

    Raises:
        CheckpointError: a file is missing or not whole, or the checkpoint is of another model, method or number of
            workers; raised on all ranks, and nothing has been loaded.
        ValueError: ``other_workers`` is none of these.
    """
    check_other_workers(other_workers)
    folder = Path(folder)
    members = _members(optimizer)

    read = []

    def check() -> int:
        manifest = Manifest.read(folder)
        _check_fits(folder, manifest, members[0], other_workers)
        for name in _needed(folder, manifest, members, other_workers):
            check_file(folder, name, manifest.files[name])
            _check_tensors(folder / name, members[0])
        read.append(manifest)
        return digest((manifest.step, manifest.groups, [manifest.files[name] for name in manifest.parts]))

    if len(set(_on_all_ranks(members, check, "cannot resume"))) > 1:
        raise CheckpointError(f"{folder} is not of one run on all ranks: their manifests differ. {ELSEWHERE}")
    [manifest] = read
    if manifest.workers != members[0].workers and members[0].rank == 0:
        logger.warning(
            "%s is of %d workers, and here are %d: momenta are taken over by %r.",
            folder, manifest.workers, members[0].workers, other_workers,
        )  # fmt: skip
    if manifest.settings != members[0].options() and members[0].rank == 0:
        here = members[0].options()
        others = [f"{name}={value!r}" for name, value in manifest.settings.items() if here.get(name) != value]
        logger.warning("%s was written with %s; here it is otherwise.", folder, ", ".join(others) or "fewer options")
    scaler = _scaler_of(optimizer)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(safe_open(folder / name, framework="pt"))
            for name in _needed(folder, manifest, members, other_workers)
        }
        for member in members:
            own = part_name(member.rank, manifest.workers)
            for place, tensor in _state_of(member):
                key = _key(*place)
                if manifest.workers == member.workers:
                    tensor.copy_(files[own].get_tensor(key))
                elif place[1] not in member.local_state_names:
                    tensor.copy_(next(iter(files.values())).get_tensor(key))
                elif other_workers == "reset":
                    tensor.zero_()
                else:
                    _mean_into(tensor, [files[part] for part in manifest.parts], key)
            for group, saved in zip(member.param_groups, manifest.groups, strict=True):
                group.update({name: _as_before(saved[name], group[name]) for name in _taken_over(group, saved)})
            member.state_changed()
            part = files[own] if manifest.workers == member.workers else next(iter(files.values()))
            if scaler is not None and SCALER in part.keys():  # noqa: SIM118
                scale, lasted = part.get_tensor(SCALER).tolist()
                scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": int(lasted)})


def last_complete_checkpoint(folder: str | Path) -> str | None:
    """The newest ``checkpoint-...`` in the folder that is whole, the same on all ranks; None if there is none.

    Those that are not are passed over with a warning. A collective, if torch.distributed is initialized.
    """
    folder = Path(folder)
    found = {int(match[1]): path for path in _subfolders(folder) if (match := _CHECKPOINT.fullmatch(path.name))}
    everyone = _gather(sorted(found))
    # Of folders of its own, a node may lack the newest.
    for step in sorted(set.intersection(*map(set, everyone)), reverse=True):
        why = _why_incomplete_anywhere(found[step])
        if why is None:
            return str(found[step])
        if not dist.is_initialized() or dist.get_rank() == 0:
            logger.warning("passed over: %s", why)
    return None


def check_complete(folder: str | Path) -> None:
    """Raise CheckpointError, on all ranks, unless the checkpoint is whole. A collective as the one above.

    A part that is lost may not be needed: :func:`load_workers` says whose it was, and what can be done.
    """
    why = next((why for why in _gather(why_incomplete(folder)) if why is not None), None)
    if why is not None:
        raise CheckpointError(why)


def _why_incomplete_anywhere(folder: Path) -> str | None:
    """What is wrong with the checkpoint, the same on all ranks; None if nothing."""
    everyone = _gather((why_incomplete(folder), sorted(path.name for path in folder.glob(ANY_PART))))
    if wrong := [why for why, _ in everyone if why is not None]:
        return wrong[0]
    lost = set(Manifest.read(folder).parts) - {name for _, names in everyone for name in names}
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


def check_other_workers(given: str) -> None:
    """Raise ValueError unless this says what becomes of another number of workers."""
    if given not in OTHER_WORKERS:
        raise ValueError(f"{given!r} is not known; with other workers, it is one of {', '.join(OTHER_WORKERS)}.")


def _members(optimizer: Optimizer) -> list[WorkersOptimizer]:
    """The workers of this process."""
    inner = getattr(optimizer, "optimizer", optimizer)
    if isinstance(inner, VirtualWorkers):
        return inner.members
    if not isinstance(inner, WorkersOptimizer):
        raise TypeError(f"{type(inner).__name__} has no workers: this is for the optimizers of hf_dlion.")
    return [inner]


def _scaler_of(optimizer: Optimizer) -> torch.amp.GradScaler | None:
    scaler: torch.amp.GradScaler | None = getattr(optimizer, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _key(index: int, name: str) -> str:
    return f"{index}.{name}"


def _state_of(member: WorkersOptimizer) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """Every tensor of a worker's state, with the index of its parameter and its name."""
    parameters = [parameter for group in member.param_groups for parameter in group["params"]]
    for index, parameter in enumerate(parameters):
        for name, tensor in member.state[parameter].items():
            yield (index, name), tensor


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A param group as JSON takes it."""
    kept = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    numbers = {name: float(value) if isinstance(value, Tensor) else value for name, value in kept.items()}
    return numbers | {"params": len(group["params"])}


def _taken_over(group: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    return [name for name in _plain(group) if name in saved and name != "params"]


def _as_before(value: Any, before: Any) -> Any:
    if isinstance(before, Tensor):
        return before.fill_(float(value))
    return tuple(value) if isinstance(value, list) else value


def _needed(folder: Path, manifest: Manifest, members: Sequence[WorkersOptimizer], other_workers: str) -> list[str]:
    """The parts that this process reads."""
    if manifest.workers == members[0].workers:
        return [part_name(member.rank, manifest.workers) for member in members]
    if other_workers == "mean":
        return manifest.parts
    # What all workers have is in each part.
    return [name for name in manifest.parts if (folder / name).exists()][:1] or manifest.parts[:1]


def _check_fits(folder: Path, manifest: Manifest, member: WorkersOptimizer, other_workers: str) -> None:
    if manifest.method != type(member).__name__:
        raise CheckpointError(
            f"{folder} was written by {manifest.method}, whose state is not that of {type(member).__name__}. Go on "
            "with the same method, or train from the model in it."
        )
    if manifest.workers != member.workers and other_workers == "error":
        raise CheckpointError(
            f"{folder} is of {manifest.workers} workers, and here are {member.workers}. Start as many, or say what "
            "becomes of their momenta: resume_world_size_policy mean or reset."
        )
    sizes = [len(group["params"]) for group in member.param_groups]
    if [group["params"] for group in manifest.groups] != sizes:
        raise CheckpointError(
            f"{folder} is of {[group['params'] for group in manifest.groups]} parameters in its groups, and here are "
            f"{sizes}. It is of another model, or of another choice of trainable parameters."
        )
    for group, saved in zip(member.param_groups, manifest.groups, strict=True):
        for name in _taken_over(group, saved):
            if _kind(saved[name]) != _kind(_plain(group)[name]):
                raise CheckpointError(f"{folder}: {name}={saved[name]!r} in a param group cannot be. {ELSEWHERE}")
        if absent := [name for name in (STEP, *member.settings()) if name not in saved]:
            raise CheckpointError(f"{folder}: a param group has no {', '.join(absent)}. {ELSEWHERE}")
        try:
            member.check_group(_plain(group) | saved)
        except ValueError as error:
            raise CheckpointError(f"{folder}: a param group with {error} {ELSEWHERE}") from error


def _check_tensors(path: Path, member: WorkersOptimizer) -> None:
    """Before anything is loaded: all tensors are there, and fit."""
    expected = {_key(*place): tensor.shape for place, tensor in _state_of(member)}
    try:
        with safe_open(path, framework="pt") as file:
            found = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            shapes = {key: torch.Size(piece.get_shape()) for key, piece in found.items()}
            dtypes = {piece.get_dtype() for piece in found.values()}
            scaling = file.get_tensor(SCALER) if shapes.get(SCALER) == (2,) else torch.ones(2)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {ELSEWHERE}") from error
    if SCALER in shapes:
        expected[SCALER] = torch.Size([2])
    if not (scaling.isfinite().all() and scaling[0] > 0 and scaling[1] >= 0):
        raise CheckpointError(f"{path}: a {SCALER} of {scaling.tolist()} cannot be. {ELSEWHERE}")
    if shapes != expected or dtypes - {"F32"}:
        differing = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        raise CheckpointError(
            f"{path} does not fit this model: {', '.join(differing[:3]) or 'dtypes'} "
            f"({', '.join(f'{key}: {tuple(shapes.get(key, ()))}' for key in differing[:3])}). {ELSEWHERE}"
        )


def _kind(value: Any) -> Any:
    """What must be alike in a hyperparameter that was saved and one that is."""
    if isinstance(value, (list, tuple)):
        return [_kind(one) for one in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return abs(value) < _LARGEST
    return type(value)


def _mean_into(tensor: Tensor, files: Sequence[Any], key: str) -> None:
    tensor.zero_()
    for file in files:
        tensor += file.get_tensor(key).to(tensor.device)
    tensor /= len(files)


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []


def _gather(value: Any) -> list[Any]:
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _on_all_ranks(members: Sequence[WorkersOptimizer], work: Callable[[], Any], what: str) -> list[Any]:
    """What ``work`` returned on every rank of the workers; where it failed on one, all raise the same."""
    result, failure = None, None
    try:
        result = work()
    except (OSError, SafetensorError, CheckpointError) as error:
        failure = str(error)
    except Exception as error:  # the others wait
        failure = f"{type(error).__name__}: {error}"
    together = [(result, failure)]
    if members[0].workers > len(members):
        group = members[0].process_group
        assert not isinstance(group, LocalWorker)
        together = ProcessChannel(group, Ledger()).gather_objects((result, failure))
    failures = {rank: failure for rank, (_, failure) in enumerate(together) if failure is not None}
    if failures:
        rank, failure = next(iter(failures.items()))
        others = f" So could ranks {', '.join(map(str, list(failures)[1:]))} not." if len(failures) > 1 else ""
        raise CheckpointError(f"rank {rank} {what}: {failure}{others}")
    return [result for result, _ in together]
