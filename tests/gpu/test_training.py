"""The Trainer on a GPU: precisions, processes that share it, resuming, what a step waits for, and an example."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_dlion import DistributedLion, DistributedMuon, DLionTrainer, hidden_matrices
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.report import run_report
from tests.gpu.device import DEVICE, run
from tests.trainer import tiny
from tests.trainer.test_trainer import weights

ROOT = Path(__file__).parents[2]
LEARNS: dict[str, Any] = {"max_steps": 30, "logging_steps": 10, "learning_rate": 1e-2, "max_grad_norm": 0.5}
VIRTUAL = {"virtual_workers": 2}
PRECISIONS: dict[str, dict[str, Any]] = {
    "compiled": {"bf16": True, "torch_compile": True},
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "bf16_parameters": {},
}
METHODS: list[dict[str, Any]] = [
    {"optim": "dmuon_mavo", "bf16": True},
    {"optim": "dlion_avg", "weight_decay": 0.1},
    {"optim": "gadamw"},
    {"optim": "adamw_torch_fused", "local_steps": 5, "learning_rate": 3e-3},
    {"optim": "adamw_torch_fused", "gradient_votes": "mavo", "learning_rate": 3e-3},
]


def trainer(folder: str | Path, parameters: torch.dtype = torch.float32, **options: Any) -> DLionTrainer:
    on_cpu = {"use_cpu": DEVICE == "cpu"}
    args = tiny.arguments(folder, **{**LEARNS, "optim": "dlion_mavo", **on_cpu, **options})
    model = tiny.model().to(parameters)
    return DLionTrainer(model=model, args=args, train_dataset=tiny.rows(), eval_dataset=tiny.rows(8))


def learned(trained: DLionTrainer) -> list[float]:
    """The losses that were logged, which fell."""
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    assert trained.args.device.type == DEVICE
    assert losses[-1] < losses[0] - 0.2, losses
    return losses


@pytest.mark.parametrize(
    ("workers", "precision"),
    [
        *((2, precision) for precision in PRECISIONS if precision != "fp16"),
        *((1, precision) for precision in PRECISIONS if precision != "compiled"),
    ],
)
def test_learns_in_every_precision(workers: int, precision: str, tmp_path: Path) -> None:
    if DEVICE == "cpu" and precision == "fp16":
        pytest.skip("transformers has fp16 on GPUs only")
    dtype = torch.bfloat16 if precision == "bf16_parameters" else torch.float32
    trained = trainer(tmp_path, dtype, virtual_workers=workers, **PRECISIONS[precision])
    trained.train()
    learned(trained)
    assert next(trained.model.parameters()).dtype == dtype


@pytest.mark.parametrize("options", METHODS, ids=lambda options: "_".join(map(str, options.values())))
def test_learns_by_methods(options: dict[str, Any], tmp_path: Path) -> None:
    trained = trainer(tmp_path, **VIRTUAL, **options)
    trained.train()
    learned(trained)
    trained.evaluate()


def launched(rank: int, folder: str, settings: list[dict[str, Any]]) -> list[tuple[list[float], torch.Tensor]]:
    """Two processes on one device, as no launcher starts them: both are the first of their machine."""
    found = []
    for number, options in enumerate(settings):
        tiny.act_as_launched(rank)
        os.environ["LOCAL_RANK"] = "0" if DEVICE == "cuda" else str(rank)
        trained = trainer(f"{folder}/{number}", ddp_backend="gloo", **options)
        assert trained.args.world_size == dist.get_world_size()
        trained.train()
        found.append((learned(trained), weights(trained.model).cpu()))
    return found


def test_processes_share_a_gpu_over_gloo(tmp_path: Path, record_property: Any) -> None:
    settings = [{}, {"fp16": DEVICE == "cuda"}, {"optim": "dmuon_avg", "bf16": True}, METHODS[3], METHODS[4]]
    first, second = run(launched, 2, str(tmp_path), settings)
    for options, one, other in zip(settings, first, second, strict=True):
        assert torch.equal(one[1], other[1]), options
    in_turns = trainer(tmp_path / "turns", **VIRTUAL)
    in_turns.train()
    alike = float(((weights(in_turns.model).cpu() - first[0][1]).abs() < 1e-6).float().mean())
    record_property("share_of_parameters_as_in_turns", alike)  # all, where the GPU sums in one order in both
    assert in_turns.state.log_history[0]["loss"] == pytest.approx(first[0][0][0], abs=0.05)


def alone_under_nccl(rank: int, folder: str) -> list[float]:
    """As `torchrun --nproc_per_node 1`: a group of one."""
    dist.destroy_process_group()
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    with tempfile.TemporaryDirectory() as meeting:
        torch.cuda.set_device(0)
        dist.init_process_group("nccl", init_method=f"file://{meeting}/place", rank=0, world_size=1)
        trained = trainer(folder, bf16=True)
        trained.train()
        losses = learned(trained)
        dist.destroy_process_group()
    return losses


@pytest.mark.skipif(DEVICE == "cpu", reason="NCCL is for GPUs")
def test_one_process_under_nccl(tmp_path: Path) -> None:
    run(alone_under_nccl, 1, str(tmp_path))


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
@pytest.mark.parametrize("options", [{**VIRTUAL, "bf16": True}, {"fp16": DEVICE == "cuda"}], ids=["bf16", "fp16"])
def test_resumes_where_it_was(options: dict[str, Any], tmp_path: Path, record_property: Any) -> None:
    steps = {"max_steps": 8, "logging_steps": 1, "lr_scheduler_type": "constant", **options}
    whole, again = trainer(tmp_path / "whole", **steps), trainer(tmp_path, **steps)
    whole.train()
    half = trainer(tmp_path, **{**steps, "max_steps": 4, "save_strategy": "steps", "save_steps": 4})
    half.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    losses = [[entry["loss"] for entry in one.state.log_history if "loss" in entry] for one in (whole, again)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)
    exact = torch.equal(weights(again.model), weights(whole.model))
    record_property("bit_for_bit", exact)
    assert exact, "resumed with other bits, though all of its algorithms are deterministic"


def some_model() -> torch.nn.Module:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(512, 512) for _ in range(8)]
    return torch.nn.Sequential(torch.nn.Embedding(1000, 512), *layers, torch.nn.Linear(512, 10)).to(DEVICE)


def in_a_step(model: torch.nn.Module, optimizer: Any, workers: int) -> None:
    for _ in range(workers):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        if workers > 1:
            optimizer.next_worker()
    optimizer.step()


def waits(step: Callable[[], Any]) -> collections.Counter[str]:
    """Where in this package one step makes the host wait for the GPU, and how often; after some that do not count."""
    for _ in range(3):
        step()
    found: collections.Counter[str] = collections.Counter()

    def note(message: Any, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            ours = [frame for frame in traceback.extract_stack() if "hf_dlion/" in frame.filename]
            where = f"{ours[-1].filename.split('hf_dlion/')[-1]}:{ours[-1].lineno} {ours[-1].line}" if ours else "?"
            found[where] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


@pytest.mark.skipif(DEVICE == "cpu", reason="a CPU is never waited for")
@pytest.mark.parametrize(("workers", "name"), [(1, "dlion"), (2, "dlion_bf16"), (2, "dlion"), (2, "dmuon")])
def test_what_a_step_waits_for(workers: int, name: str, record_property: Any) -> None:
    """What the others have said; alone, the check of its gradients. Of two virtual workers, each has its own.

    Printed and recorded: `pytest -rP`, or `--junitxml`.
    """
    model = some_model().to(torch.bfloat16 if name == "dlion_bf16" else torch.float32)
    made: Any = DistributedMuon if name == "dmuon" else DistributedLion
    params: Any = hidden_matrices(model) if name == "dmuon" else model.parameters()
    optimizer = made(params) if workers == 1 else VirtualWorkers(params, workers, made, check_replicas_steps=0)
    found = waits(lambda: in_a_step(model, optimizer, workers))
    for where, count in found.most_common():
        print(f"{count} x {where}")  # noqa: T201
    record_property("waits", sum(found.values()))
    record_property("where", json.dumps(found.most_common(12)))
    assert sum(count for where, count in found.items() if "optim/" in where) == workers


def launch(script: str, *options: str) -> str:
    """What an example prints that ``accelerate launch`` starts as one process, with two virtual workers."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", f"examples/{script}", "--virtual_workers", "2"]
    command += ["--optim", "dlion_mavo", "--bf16", "--report_to", "none", *["--use_cpu"] * (DEVICE == "cpu")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(DEVICE == "cpu", reason="it measures a GPU")
def test_the_benchmark(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.benchmarks.gpu", "--sizes", "124M", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr[-4000:]
    assert set(json.loads((tmp_path / "results.json").read_text())["cases"]) == {"124M, float32", "124M, bfloat16"}


def test_the_minimal_example(tmp_path: Path) -> None:
    said = launch("minimal_trainer.py", "--learning_rate", "3e-3", "--max_steps", "60", "--output_dir", str(tmp_path))
    assert float(said.rpartition("validation loss ")[2]) < 3


def test_the_pretraining_example(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    corpus = tmp_path / "corpus.jsonl"
    rows = [{"text": f"Document {i} says that {i} times two is {2 * i}. " * 3} for i in range(200)]
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dataset", str(corpus), "--vocab_size", "300", "--block_size", "32", "--max_eval_blocks", "8"]
    options += ["--per_device_train_batch_size", "2", "--learning_rate", "1e-3", "--model_card"]
    options += ["--max_steps", "30" if DEVICE == "cuda" else "4"]
    launch("pretrain_gpt2.py", *options, "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["validation_loss_last"] < results["validation_loss_first"]
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    assert results["machine"].endswith(name)
    assert name in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_the_report_names_the_gpu(tmp_path: Path) -> None:
    trained = trainer(tmp_path, max_steps=1)
    trained.train()
    machine = run_report(trained)["machine"]
    assert machine.endswith(torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu")
