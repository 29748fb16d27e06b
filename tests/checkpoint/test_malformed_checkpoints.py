"""500 checkpoints that are not what was written: each is refused, and nothing of it is loaded."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_dlion import DistributedLion, load_workers, save_workers
from hf_dlion.checkpoint.complete import why_incomplete
from hf_dlion.checkpoint.manifest import MANIFEST, CheckpointError, _hash, entry_of
from hf_dlion.checkpoint.workers import SCALER
from hf_dlion.optim.virtual import VirtualWorkers
from tests.trainer import tiny

COUNT = 500
WORKERS = 2
PART = "worker_00000_of_00002.safetensors"
OTHER = "worker_00001_of_00002.safetensors"
EXECUTED = "was_executed"


def optimizer(size: int = 30) -> VirtualWorkers:
    params = [torch.nn.Parameter(torch.ones(4, size)), torch.nn.Parameter(torch.ones(5))]
    return VirtualWorkers(params, WORKERS, DistributedLion)


def step(chosen: VirtualWorkers, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(WORKERS):
        for parameter in chosen.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        chosen.next_worker()
    chosen.step()


def momenta(chosen: VirtualWorkers) -> list[torch.Tensor]:
    return [state["momentum"].clone() for member in chosen.members for state in member.state.values()]


def write(folder: Path, seed: int, size: int = 30) -> Path:
    folder.mkdir()
    chosen = optimizer(size)
    step(chosen, seed)
    (folder / "model.safetensors").write_bytes(random.Random(seed).randbytes(500))
    save_workers(folder, chosen)
    return folder


class Evil:
    def __reduce__(self) -> Any:
        return Path.touch, (Path(os.environ[EXECUTED]),)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest as one who can compute hashes would."""
    path = folder / MANIFEST
    content = json.loads(path.read_text())
    content.pop("sha256")
    change(content)
    path.write_text(json.dumps(content | {"sha256": _hash(content)}))


def replace_part(folder: Path, content: bytes) -> None:
    (folder / PART).write_bytes(content)
    entry = entry_of(folder / PART)
    rewrite(folder, lambda found: found["files"].update({PART: {"size": entry.size, "sha256": entry.sha256}}))


def truncate(folder: Path, other: Path, draw: random.Random) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def flip(folder: Path, other: Path, draw: random.Random) -> None:
    path = draw.choice(sorted(folder.iterdir()))
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def grow(folder: Path, other: Path, draw: random.Random) -> None:
    path = draw.choice([path for path in sorted(folder.iterdir()) if path.name != MANIFEST])
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randrange(1, 9)))


def remove(folder: Path, other: Path, draw: random.Random) -> None:
    draw.choice(sorted(folder.iterdir())).unlink()


def wrong_rank(folder: Path, other: Path, draw: random.Random) -> None:
    (folder / PART).rename(folder / "held")
    (folder / OTHER).rename(folder / PART)
    (folder / "held").rename(folder / OTHER)


def of_another(folder: Path, other: Path, draw: random.Random) -> None:
    name = draw.choice([MANIFEST, PART, OTHER, "model.safetensors"])
    shutil.copy(other / name, folder / name)


def linked(folder: Path, other: Path, draw: random.Random) -> None:
    (folder / PART).unlink()
    (folder / PART).symlink_to(draw.choice([other / PART, Path("/etc/hostname"), folder]))


def hostile_name(folder: Path, other: Path, draw: random.Random) -> None:
    names = [
        "../other",
        "/etc/passwd",
        "a/../../b",
        "a\\b",
        "",
        ".",
        "..",
        "a//b",
        "nul\0",
        "x" * 5000,
        "~/x",
        "worker",
    ]
    chosen = draw.choice(names)
    if draw.random() < 0.5:
        rewrite(folder, lambda found: found["files"].update({chosen: found["files"][PART]}))
    else:
        rewrite(folder, lambda found: found["parts"].__setitem__(draw.randrange(2), chosen))


def hostile_value(folder: Path, other: Path, draw: random.Random) -> None:
    values = [-1, 10**30, 1e308, float("nan"), None, True, "1", [], {}, [[]] * 50, "0" * 64, {"a": 1}, 3.5]
    places: list[Callable[[dict[str, Any], Any], Any]] = [
        lambda found, value: found["files"][PART].update(size=value),
        lambda found, value: found["files"][PART].update(sha256=value if value != "0" * 64 else "0" * 64),
        lambda found, value: found["files"].update({PART: value}),
        lambda found, value: found.update(files=value),
        lambda found, value: found.update(parts=value),
        lambda found, value: found.update(workers=value),
        lambda found, value: found.update(format=value),
        lambda found, value: found.update(groups=value),
        lambda found, value: found["groups"][0].update(params=value),
        lambda found, value: found["groups"][0].update(betas=value),
        lambda found, value: found.update(method=value if value is not None else "Other"),
        lambda found, value: found.update({"unknown": value}),
        lambda found, value: found.pop(draw.choice(sorted(found))),
    ]
    place, value = draw.choice(places), draw.choice(values)
    rewrite(folder, lambda found: place(found, value))


def hostile_group(folder: Path, other: Path, draw: random.Random) -> None:
    values = {"lr": [-1, 10**400, None], "betas": [[2, 3], [0.9]], "step": [-5, 0.5], "weight_decay": [-1]}
    name = draw.choice(sorted(values))
    value = draw.choice(values[name])
    if draw.random() < 0.2:
        rewrite(folder, lambda found: found["groups"][0].pop(name))
    else:
        rewrite(folder, lambda found: found["groups"][0].update({name: value}))


def deep(folder: Path, other: Path, draw: random.Random) -> None:
    (folder / MANIFEST).write_text("[" * draw.randrange(2000, 200_000))


def pickled(folder: Path, other: Path, draw: random.Random) -> None:
    replace_part(folder, pickle.dumps(Evil()))


def hostile_header(folder: Path, other: Path, draw: random.Random) -> None:
    header = {"0.momentum": {"dtype": "F32", "shape": [4, 30], "data_offsets": [0, 480]}}
    header["0.momentum"] |= draw.choice(
        [{"data_offsets": [0, 1 << 40]}, {"data_offsets": [480, 0]}, {"shape": [1 << 62, 4]}, {"dtype": "CODE"}]
    )
    text = json.dumps(header).encode()
    length = draw.choice([len(text), 1 << 62, 0, len(text) + 10_000])
    replace_part(folder, struct.pack("<Q", length) + text + bytes(480))


def other_tensors(folder: Path, other: Path, draw: random.Random) -> None:
    tensors = load_file(folder / PART)
    kind = draw.randrange(5)
    if kind == 0:
        tensors["0.momentum"] = tensors["0.momentum"].double()
    elif kind == 1:
        tensors["0.momentum"] = tensors["0.momentum"].T.contiguous()
    elif kind == 2:
        tensors["2.momentum"] = torch.ones(3)
    elif kind == 3:
        scaling = draw.choice(
            [[float("nan"), 1], [1, float("nan")], [0, 1], [1, -1], [float("inf"), 1], [1], [1, 1, 1]]
        )
        tensors[SCALER] = torch.tensor(scaling, dtype=torch.float32)
    else:
        del tensors["1.momentum"]
    save_file(tensors, folder / "made")
    content = (folder / "made").read_bytes()
    (folder / "made").unlink()
    replace_part(folder, content)


KINDS = [
    truncate, flip, grow, remove, wrong_rank, of_another, linked, hostile_name, hostile_value, hostile_value,
    hostile_group, deep, pickled, hostile_header, other_tensors,
]  # fmt: skip


def test_malformed_checkpoints_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXECUTED, str(tmp_path / EXECUTED))
    good, other = write(tmp_path / "good", 1), write(tmp_path / "other", 2, size=31)
    chosen = optimizer()
    load_workers(good, chosen)
    whole = momenta(chosen)
    step(chosen, 3)
    before, settings = momenta(chosen), [dict(group, params=None) for group in chosen.param_groups]
    refused = set()
    for seed in range(COUNT):
        draw = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        folder = tmp_path / "spoilt"
        shutil.copytree(good, folder)
        kind(folder, other, draw)
        passed_over = why_incomplete(folder)
        refusal = None
        try:
            load_workers(folder, chosen)
        except CheckpointError as error:
            refusal = str(error)
        if refusal is not None:
            assert str(folder) in refusal, (kind, seed)
            assert all(map(torch.equal, before, momenta(chosen))), (kind, seed)
            assert [dict(group, params=None) for group in chosen.param_groups] == settings
            refused.add(kind)
        else:  # what is spoilt is not the workers' state, which is whole then
            assert passed_over is not None, (kind, seed)
            assert str(folder) in passed_over
            assert all(map(torch.equal, whole, momenta(chosen))), (kind, seed)
            chosen = optimizer()
            step(chosen, 3)
            before, settings = momenta(chosen), [dict(group, params=None) for group in chosen.param_groups]
        shutil.rmtree(folder)
    assert not (tmp_path / EXECUTED).exists()
    assert refused == set(KINDS)
    load_workers(good, chosen)  # the original still is what it was


def test_a_scheduler_that_is_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EXECUTED, str(tmp_path / EXECUTED))
    tiny.trainer(0, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "checkpoint-2"
    (folder / "scheduler.pt").write_bytes(pickle.dumps(Evil()))
    entry = entry_of(folder / "scheduler.pt")
    rewrite(folder, lambda found: found["files"].update({"scheduler.pt": {"size": entry.size, "sha256": entry.sha256}}))
    with pytest.raises(pickle.UnpicklingError, match="[Ww]eights.only"):
        tiny.trainer(0, tmp_path, max_steps=3).train(resume_from_checkpoint=str(folder))
    assert not (tmp_path / EXECUTED).exists()
