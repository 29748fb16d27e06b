"""What every worker keeps for itself, written and read.

Beside what others write into a folder, each worker writes its own state, and then a manifest is written that names
every file of the folder with size and hash (``manifest``).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from ..bits.hashing import digest
from ..optim.renamed import renamed_keywords
from ..optim.replica import STEP
from ..optim.sharding import find_shards, shard_rows
from ..optim.states import all_parameters
from ..optim.workers import WorkersOptimizer, members_of
from ..wire.groups import make_channel
from ..wire.ledger import Ledger
from ..wire.shards import Shards
from .inner import PREFIX, check_inner, inner_state, load_inner
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
    written_by_others,
)

logger = logging.getLogger(__name__)

WORLD_SIZE_POLICIES = ("mean", "reset", "error")

SCALER = "gradient_scaler"
"""Of a part with fp16: the worker's own scale, and how many steps it has lasted."""

_LARGEST = 1e38  # of a hyperparameter: float32 has it


@renamed_keywords(seals="write_manifest")
def save_workers(folder: str | Path, optimizer: Optimizer, *, write_manifest: bool | None = None) -> None:
    """Write every worker's state into the folder, and the manifest. A collective over the workers.

    In a loop of your own, after all else has been written on all ranks: after ``accelerator.save_state(folder)``.

    Args:
        folder: exists; with several nodes, shared by them, or one on each.
        optimizer: of this package, as it is or prepared by accelerate, with whose gradient scaler its worker's is kept.
        write_manifest: whether this rank writes the manifest; by default rank 0 does. One rank of each folder.

    Raises:
        CheckpointError: a rank could not write; raised on all ranks. Where it could not, the folder has no manifest.
    """
    folder = Path(folder)
    members, scaler = _members(optimizer), _scaler_of(optimizer)
    first = members[0]
    if write_manifest is None:
        write_manifest = _place(first) == 0
    remove_manifest(folder, write_manifest)
    parts: dict[str, Entry] = {}
    for one in _on_all_ranks(members, lambda: _write_parts(folder, members, scaler), f"could not write into {folder}"):
        parts |= one

    def finish() -> None:
        if write_manifest:
            _manifest_of(folder, first, parts).write(folder)

    _on_all_ranks(members, finish, f"could not write the manifest of {folder}")
    if not (folder / MANIFEST).exists():
        logger.warning(
            "%s has no manifest on the machine of rank %d, and does not count there. Let the machines share the "
            "folder, or let a rank of each write it: --save_on_each_node, or the argument `write_manifest`.",
            folder, _place(first),
        )  # fmt: skip


def remove_manifest(folder: str | Path, write_manifest: bool) -> None:
    """Before the folder is written into again, on the rank that writes the manifest."""
    if write_manifest:
        (Path(folder) / MANIFEST).unlink(missing_ok=True)


@renamed_keywords(other_workers="resume_world_size_policy")
def load_workers(folder: str | Path, optimizer: Optimizer, *, resume_world_size_policy: str = "mean") -> None:
    """Load what :func:`save_workers` wrote. A collective over the workers.

    In a loop of your own, after ``accelerator.load_state(folder)``. With as many workers as wrote it, each has its own
    state again. Otherwise, what a worker keeps for itself (momentum, residual) becomes what the policy says; the mean
    is taken tensor by tensor, so that no more than two of a parameter's size are held beside the state. Gradient
    scalers then all start from that of rank 0. Replicas that were sharded over another number of ranks, or not at all,
    are resharded: whatever the policy, a rank reads the rows that are now its own.

    Args:
        folder: of the checkpoint.
        optimizer: of this package, as it is or prepared by accelerate, for the same parameters.
        resume_world_size_policy: with another number of workers than wrote it: ``"mean"``, all have the mean of the
            old ones'; ``"reset"``, zeros; or ``"error"``.

    Raises:
        CheckpointError: a file is missing or not whole, or the checkpoint is of another model, method or number of
            workers; raised on all ranks, and nothing has been loaded.
        ValueError: the policy is none of these.
    """
    policy = resume_world_size_policy
    if policy not in WORLD_SIZE_POLICIES:
        known = ", ".join(WORLD_SIZE_POLICIES)
        raise ValueError(f"resume_world_size_policy={policy!r} is not known; with other workers, it is one of {known}.")
    folder, members = Path(folder), _members(optimizer)
    for member in members:
        member.make_state()

    def check() -> tuple[Manifest, int]:
        manifest = Manifest.read(folder)
        _check_fits(folder, manifest, members[0], policy)
        for name in _needed(folder, manifest, members, policy):
            check_file(folder, name, manifest.files[name])
            _check_tensors(folder / name, members[0], manifest)
        return manifest, digest((manifest.step, manifest.groups, [manifest.files[name] for name in manifest.parts]))

    everyone = _on_all_ranks(members, check, "cannot resume")
    if len({written for _, written in everyone}) > 1:
        raise CheckpointError(f"{folder} is not of one run on all ranks: their manifests differ. {ELSEWHERE}")
    manifest, _ = everyone[_place(members[0])]
    if _place(members[0]) == 0:
        _warn_of_differences(folder, manifest, members[0], policy)
    with ExitStack() as stack:
        files = {
            name: stack.enter_context(safe_open(folder / name, framework="pt"))
            for name in _needed(folder, manifest, members, policy)
        }
        for member in members:
            _load_member(member, manifest, files, policy, _scaler_of(optimizer))


def _write_parts(
    folder: Path, members: Sequence[WorkersOptimizer], scaler: torch.amp.GradScaler | None
) -> dict[str, Entry]:
    """The parts of the workers of this process."""
    written = {}
    for member in members:
        member.make_state()
        shards = _shards_of(member)
        name = part_name(member.rank, member.workers, *((shards.rank, shards.size) if shards else ()))
        saved = member.saved_tensors(member.param_groups)
        tensors = {_key(index, key): tensor.detach().float().contiguous() for index, key, tensor in saved}
        others: dict[str, str] | None = None
        if member.inner is not None:
            of_inner, others = inner_state(member.inner)
            tensors |= of_inner
        if scaler is not None:
            state = scaler.state_dict()
            tensors[SCALER] = torch.tensor([state["scale"], state["_growth_tracker"]], dtype=torch.float32)
        write_whole(folder / name, lambda part, tensors=tensors, others=others: save_file(tensors, part, others))  # type: ignore[misc]
        written[name] = entry_of(folder / name)
    return written


def _manifest_of(folder: Path, member: WorkersOptimizer, parts: dict[str, Entry]) -> Manifest:
    """Of all that is in the folder, but for parts of an earlier writing, which are deleted."""
    for stale in set(folder.glob(ANY_PART)) - {folder / name for name in parts}:
        stale.unlink()
    names = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != MANIFEST)
    found = {path.relative_to(folder).as_posix(): path for path in names if not path.name.startswith(TEMPORARY)}
    files = {name: parts.get(name) or entry_of(path, flush=True) for name, path in found.items()}
    return Manifest(
        method=member.method,
        options=member.options(),
        workers=member.workers,
        shards=shards.size if (shards := _shards_of(member)) else 1,
        step=member.param_groups[0][STEP],
        groups=[_plain(group) for group in member.param_groups],
        parts=sorted(parts),
        files=parts | files,
    )


def _warn_of_differences(folder: Path, manifest: Manifest, member: WorkersOptimizer, policy: str) -> None:
    if manifest.workers != member.workers:
        logger.warning(
            "%s is of %d workers, and here are %d: momenta are taken over by %r.",
            folder, manifest.workers, member.workers, policy,
        )  # fmt: skip
    if manifest.shards != (shards.size if (shards := _shards_of(member)) else 1):
        logger.info("%s has %d shards of each worker, and is resharded.", folder, manifest.shards)
    here = member.options()
    if manifest.options != here:
        others = [f"{name}={value!r}" for name, value in manifest.options.items() if here.get(name) != value]
        others += [f"no {name}" for name in here if name not in manifest.options]
        logger.warning("%s was written with %s; here it is otherwise.", folder, ", ".join(others))


def _load_member(
    member: WorkersOptimizer,
    manifest: Manifest,
    files: dict[str, Any],
    policy: str,
    scaler: torch.amp.GradScaler | None,
) -> None:
    """Take over state, hyperparameters and gradient scale; all of them were checked."""
    as_many = manifest.workers == member.workers
    shards = _shards_of(member)
    workers = [w for w in range(manifest.workers) if files.keys() >= set(_parts_for(shards, manifest, w))]
    first = [files[name] for name in _parts_for(shards, manifest, member.rank if as_many else workers[0])]
    for index, name, tensor in member.saved_tensors(manifest.groups):
        key = _key(index, name)
        shape = all_parameters(member)[index].shape
        if as_many or name not in member.local_state_names:
            tensor.copy_(_held(first, key, shape, shards))
        elif policy == "reset":
            member.forget_own(index, name, tensor)
        else:
            total = torch.zeros_like(tensor, dtype=torch.float32)
            for worker in workers:
                parts = [files[part] for part in _parts_for(shards, manifest, worker)]
                total += _held(parts, key, shape, shards).to(tensor.device)
            tensor.copy_(total.div_(len(workers)))
    for group, saved in zip(member.param_groups, manifest.groups, strict=True):
        group.update({name: _as_before(saved[name], group[name]) for name in _taken_over(group, saved)})
    if member.inner is not None:
        of_all = [[files[name] for name in _parts_for(shards, manifest, worker)] for worker in workers]
        sources = [first] if as_many else of_all if policy == "mean" else []
        load_inner(member.inner, sources, partial(_held_of_inner, all_parameters(member), manifest.shards, shards))
        member.inner.param_groups = member.param_groups
    member.state_changed()
    if scaler is not None and SCALER in first[0].keys():  # noqa: SIM118
        scale, lasted = first[0].get_tensor(SCALER).tolist()
        scaler.load_state_dict(scaler.state_dict() | {"scale": scale, "_growth_tracker": int(lasted)})


def _members(optimizer: Optimizer) -> Sequence[WorkersOptimizer]:
    members = members_of(optimizer)
    if not members:
        raise TypeError(f"{type(optimizer).__name__} has no workers: this is for the optimizers of hf_dlion.")
    return members


def _scaler_of(optimizer: Optimizer) -> torch.amp.GradScaler | None:
    scaler: torch.amp.GradScaler | None = getattr(optimizer, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _key(index: int, name: str) -> str:
    return f"{index}.{name}"


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    """A param group as JSON takes it."""
    kept = {name: value for name, value in group.items() if name not in ("params", "param_names")}
    numbers = {name: float(value) if isinstance(value, Tensor) else value for name, value in kept.items()}
    return numbers | {"params": len(group["params"])}


_NOT_TAKEN_OVER = ("params", "fused", "foreach", "capturable", "differentiable")
"""The latter say how torch computes, and not what."""


def _taken_over(group: dict[str, Any], saved: dict[str, Any]) -> list[str]:
    return [name for name in _plain(group) if name in saved and name not in _NOT_TAKEN_OVER]


def _as_before(value: Any, before: Any) -> Any:
    """A hyperparameter from JSON, which has lists only, in the form of the one that it replaces."""
    if isinstance(before, Tensor):
        return before.fill_(float(value))
    if isinstance(before, (list, tuple)):
        return type(before)(map(_as_before, value, before))
    return value


def _shards_of(member: WorkersOptimizer) -> Shards | None:
    return find_shards(all_parameters(member), member.process_group)


def _place(member: WorkersOptimizer) -> int:
    """The number of a rank among those of all workers, shard by shard."""
    shards = _shards_of(member)
    return member.rank if shards is None else member.rank * shards.size + shards.rank


def _parts_for(shards: Shards | None, manifest: Manifest, worker: int) -> list[str]:
    """The parts of a worker that this rank reads to take over its state."""
    parts = manifest.parts_of(worker)
    return [parts[shards.rank]] if shards is not None and shards.size == len(parts) else parts


def _held(parts: Sequence[Any], key: str, shape: torch.Size, shards: Shards | None) -> Tensor:
    """What this rank holds of a tensor, from the parts of its worker: one that is just that, or all of them.

    Args:
        parts: open files.
        key: of the tensor.
        shape: of the whole of it.
        shards: the ranks that hold the replica now.
    """
    if len(parts) == 1 and shards is None:
        return parts[0].get_tensor(key)
    here = shard_rows(shape[0], shards.size) if shards is not None else [shape[0]]
    rank = shards.rank if shards is not None else 0
    if len(parts) == 1 and list(parts[0].get_slice(key).get_shape()) == [here[rank], *shape[1:]]:
        return parts[0].get_tensor(key)
    first, last, start = sum(here[:rank]), sum(here[: rank + 1]), 0
    rows = [parts[0].get_slice(key)[:0]]
    for part in parts:
        piece = part.get_slice(key)
        height = piece.get_shape()[0]
        if max(first, start) < min(last, start + height):
            rows.append(piece[max(first - start, 0) : min(last - start, height)])
        start += height
    return torch.cat(rows)


def _held_of_inner(
    parameters: Sequence[Tensor], cut_into: int, shards: Shards | None, parts: Sequence[Any], key: str, index: int
) -> Tensor:
    """As :func:`_held`, of a tensor of an inner optimizer, which is as its parameter was cut, or of another shape."""
    shape = parameters[index].shape
    if not shape:
        return parts[0].get_tensor(key)
    first = shards.rank if shards is not None and cut_into > 1 and len(parts) == 1 else 0
    as_cut = [shard_rows(shape[0], cut_into)[first], *shape[1:]]
    return (
        _held(parts, key, shape, shards) if parts[0].get_slice(key).get_shape() == as_cut else parts[0].get_tensor(key)
    )


def _needed(folder: Path, manifest: Manifest, members: Sequence[WorkersOptimizer], policy: str) -> list[str]:
    """The parts that this process reads."""
    shards = _shards_of(members[0])
    by_worker = [_parts_for(shards, manifest, worker) for worker in range(manifest.workers)]
    if manifest.workers == members[0].workers:
        return [name for member in members for name in by_worker[member.rank]]
    if policy == "mean":
        return [name for parts in by_worker for name in parts]
    # What all workers have is in the parts of each.
    there = [parts for parts in by_worker if all((folder / name).exists() for name in parts)]
    return (there or by_worker)[0]


def _check_fits(folder: Path, manifest: Manifest, member: WorkersOptimizer, policy: str) -> None:
    if manifest.method != member.method:
        raise CheckpointError(written_by_others(folder, member.method, manifest.method))
    if manifest.workers != member.workers and policy == "error":
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
                raise CheckpointError(f"{folder}: {name}={saved[name]!r} in a param group is not valid. {ELSEWHERE}")
        if absent := [name for name in (STEP, *member.hyperparameters()) if name not in saved]:
            raise CheckpointError(f"{folder}: a param group has no {', '.join(absent)}. {ELSEWHERE}")
        try:
            member.check_group(_plain(group) | saved)
        except ValueError as error:
            raise CheckpointError(f"{folder}: a param group with {error} {ELSEWHERE}") from error


def _check_tensors(path: Path, member: WorkersOptimizer, manifest: Manifest) -> None:
    """Before anything is loaded: all tensors are there, and fit."""
    shard = manifest.parts.index(path.name) % manifest.shards
    expected = {}
    for index, name, _ in member.saved_tensors(manifest.groups):
        shape = all_parameters(member)[index].shape
        rows = shard_rows(shape[0], manifest.shards)[shard : shard + 1] if manifest.shards > 1 and shape else shape[:1]
        expected[_key(index, name)] = torch.Size([*rows, *shape[1:]])
    try:
        with safe_open(path, framework="pt") as file:
            keys = [key for key in file.keys() if member.inner is None or not key.startswith(PREFIX)]  # noqa: SIM118
            if member.inner is not None:
                check_inner(file, len(all_parameters(member)))
            found = {key: file.get_slice(key) for key in keys}
            shapes = {key: torch.Size(piece.get_shape()) for key, piece in found.items()}
            dtypes = {piece.get_dtype() for piece in found.values()}
            scaling = file.get_tensor(SCALER) if shapes.get(SCALER) == (2,) else torch.ones(2, dtype=torch.float32)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {ELSEWHERE}") from error
    if SCALER in shapes:
        expected[SCALER] = torch.Size([2])
    if not (scaling.isfinite().all() and scaling[0] > 0 and scaling[1] >= 0):
        raise CheckpointError(f"{path}: a {SCALER} of {scaling.tolist()} is not valid. {ELSEWHERE}")
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
        channel = make_channel(members[0].process_group, Ledger())
        assert channel is not None
        together = channel.gather_objects((result, failure))
    if (shards := _shards_of(members[0])) is not None:
        by_shard = shards.channel.gather_objects(together)
        together = [one for of_worker in zip(*by_shard, strict=True) for one in of_worker]
    failures = {rank: failure for rank, (_, failure) in enumerate(together) if failure is not None}
    if failures:
        rank, failure = next(iter(failures.items()))
        more = list(failures)[1:]
        others = f" Rank{'s' * (len(more) > 1)} {', '.join(map(str, more))} failed, too." if more else ""
        raise CheckpointError(f"rank {rank} {what}: {failure}{others}")
    return [result for result, _ in together]
