"""What the structure of the package promises; a change here is a deliberate one."""

from __future__ import annotations

import ast
import functools
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import hf_dlion
from hf_dlion import (
    DistributedLion,
    DistributedMuon,
    DLionArgumentsMixin,
    LocalSteps,
    hidden_matrices,
    keep_gradients_local,
    load_workers,
    save_workers,
    vote_gradients,
)
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.optim.workers import WorkersOptimizer
from hf_dlion.trainer.methods import METHODS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_dlion"
LAYERS = ["bits", "wire", "optim", "checkpoint", "trainer", "integrations"]
MOST_LINES = 50
MOST_FLOORS = 5

PUBLIC = [
    "DLionArgumentsMixin",
    "DLionTrainer",
    "DLionTrainerMixin",
    "DLionTrainingArguments",
    "DistributedLion",
    "DistributedMuon",
    "LionTheoryCallback",
    "LocalSteps",
    "hidden_matrices",
    "keep_gradients_local",
    "last_complete_checkpoint",
    "load_workers",
    "save_workers",
    "vote_gradients",
]

NAMES = [
    "dlion_mavo",
    "dlion_avg",
    "dsignum_mavo",
    "dsignum_avg",
    "dmuon_mavo",
    "dmuon_avg",
    "glion",
    "gadamw",
    "gmuon",
    "terngrad",
    "graddrop",
    "dgc",
]

FIELDS = [
    "optim",
    "lion_beta1",
    "lion_beta2",
    "muon_beta2",
    "muon_ns_steps",
    "muon_rest",
    "vote_tie",
    "vote_exchange",
    "norm_gradients",
    "overlap_votes",
    "signum_momentum",
    "base_rule",
    "sgd_momentum",
    "terngrad_clip",
    "drop_share",
    "dgc_warmup_steps",
    "dgc_clip",
    "gradient_votes",
    "local_steps",
    "outer_learning_rate",
    "outer_momentum",
    "local_fragments",
    "local_delay",
    "outer_aggregation",
    "on_bad_gradient",
    "check_replicas_steps",
    "resume_world_size_policy",
    "virtual_workers",
    "adversaries",
    "adversary",
]

ARGUMENTS: dict[Callable[..., Any], list[str]] = {
    DistributedLion: [
        "params",
        "lr",
        "betas",
        "weight_decay",
        "aggregation",
        "tie",
        "exchange",
        "norm_gradients",
        "overlap",
        "options",
    ],
    DistributedMuon: [
        "params",
        "lr",
        "betas",
        "weight_decay",
        "hidden_betas",
        "ns_steps",
        "rest",
        "eps",
        "aggregation",
        "tie",
        "exchange",
        "options",
    ],
    hidden_matrices: ["model", "decayed", "others", "splits"],
    WorkersOptimizer: [
        "params",
        "defaults",
        "shared_state_names",
        "local_state_names",
        "process_group",
        "on_bad_gradient",
        "check_replicas_steps",
    ],
    LocalSteps: [
        "inner",
        "every",
        "outer_lr",
        "outer_momentum",
        "nesterov",
        "fragments",
        "delay",
        "aggregation",
        "tie",
        "exchange",
        "options",
    ],
    VirtualWorkers: ["params", "workers", "method", "adversaries", "adversary", "options"],
    save_workers: ["folder", "optimizer", "write_manifest"],
    load_workers: ["folder", "optimizer", "resume_world_size_policy"],
    keep_gradients_local: ["target"],
    vote_gradients: ["target", "aggregation", "dither", "exchange", "on_bad_gradient", "scaler", "process_group"],
}


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it, from ``hf_dlion`` on."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hf_dlion"))
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            name = ".".join(filter(None, [base, node.module or ""]))
            if name.startswith("hf_dlion"):
                yield from {f"{name}.{alias.name}" for alias in node.names}


def layer(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/*.py")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_point_one_way(path: Path) -> None:
    own = LAYERS.index(path.parent.name)
    for module in imported(path):
        if layer(module) in ("local_gradients", "gradient_votes"):
            assert path.parent.name == "trainer", module
        else:
            assert LAYERS.index(layer(module)) <= own, module


def test_local_gradients_know_optimizers_alone() -> None:
    assert {layer(module) for module in imported(PACKAGE / "local_gradients.py")} == {"optim"}


def test_gradient_votes_know_no_trainer() -> None:
    known = {layer(module) for module in imported(PACKAGE / "gradient_votes.py")}
    assert known == {"gradient_buckets", "local_gradients", "optim", "wire"}
    assert {layer(module) for module in imported(PACKAGE / "gradient_buckets.py")} == {"bits", "optim", "wire"}


def test_optim_is_not_deep() -> None:
    @functools.cache
    def floor(name: str) -> int:
        below = {
            module.split(".")[2] for module in imported(PACKAGE / "optim" / f"{name}.py") if layer(module) == "optim"
        }
        return 1 + max(map(floor, below), default=0)

    floors = {path.stem: floor(path.stem) for path in (PACKAGE / "optim").glob("*.py")}
    assert max(floors.values()) <= MOST_FLOORS, floors


@pytest.mark.parametrize("folder", ["hf_dlion", "examples"])
def test_functions_fit_on_a_screen(folder: str) -> None:
    lengths = {
        f"{path.relative_to(ROOT)}:{node.name}": node.end_lineno - node.lineno + 1
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None
    }
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_base_is_short() -> None:
    assert len(inspect.getsourcelines(WorkersOptimizer)[0]) < 200


def test_one_module_knows_of_dtensor() -> None:
    users = [path.name for path in PACKAGE.rglob("*.py") if "DTensor" in path.read_text(encoding="utf-8")]
    assert users == ["tensors.py"]


def test_the_trainer_and_checkpoints_ask_no_optimizer_for_its_class() -> None:
    classes = {name for path in (PACKAGE / "optim").glob("*.py") for name in _classes(path)}
    for path in [*(PACKAGE / "trainer").glob("*.py"), *(PACKAGE / "checkpoint").glob("*.py")]:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
                named = {one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)}
                assert not named & classes, f"{path.name}:{node.lineno}"


def _classes(path: Path) -> Iterator[str]:
    return (node.name for node in tree(path).body if isinstance(node, ast.ClassDef))


@pytest.mark.parametrize("statement", ["import hf_dlion", "from hf_dlion import save_workers, load_workers"])
def test_a_plain_loop_loads_no_transformers(statement: str) -> None:
    script = f"import sys; {statement}; print([m for m in ('transformers', 'accelerate') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.strip() == "[]"


def test_public_names() -> None:
    assert sorted(hf_dlion.__all__) == PUBLIC
    assert set(PUBLIC) <= set(dir(hf_dlion))
    for name in PUBLIC:
        assert getattr(hf_dlion, name).__name__ == name
    assert list(METHODS) == NAMES


def test_argument_names() -> None:
    assert [field.name for field in fields(DLionArgumentsMixin)] == FIELDS
    for function, names in ARGUMENTS.items():
        assert list(inspect.signature(function).parameters) == names
