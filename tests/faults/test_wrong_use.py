"""Wrong use over processes: every rank says what is wrong, and ends with an exit code that is not zero.

``tests/optim/test_dlion_errors.py`` has more, and that no parameter has changed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.nn.parallel import DistributedDataParallel

from hf_dlion import DistributedLion
from hf_dlion.trainer.methods import METHODS
from tests.faults.victims import CAN_NAME, LOST
from tests.harness import run_to_their_ends


def step(rank: int, options: list[dict[str, Any]], method: str = "dlion_mavo", dtype: Any = torch.float32) -> None:
    """A first step with gradients that differ, and this rank's options."""
    weight = Parameter(torch.ones(8, dtype=dtype))
    named = METHODS[method]
    optimizer = named.optimizer([weight], **named.fixed | options[rank])
    weight.grad = torch.linspace(1, 2 + rank, 8).to(dtype)
    optimizer.step()


def other_method(rank: int) -> None:
    step(rank, [{}] * 2, ["dlion_mavo", "glion"][rank])


def other_dtype(rank: int) -> None:
    step(rank, [{}] * 2, dtype=[torch.float32, torch.bfloat16][rank])


def complex_parameter(rank: int) -> None:
    step(rank, [{}] * 2, dtype=torch.complex64)


def other_groups(rank: int) -> None:
    first, second = (Parameter(torch.ones(8)) for _ in range(2))
    groups = [[{"params": [first, second]}], [{"params": [first]}, {"params": [second]}]][rank]
    DistributedLion(groups).step()


def other_step(rank: int) -> None:
    """One rank resumes, the other begins."""
    weight = Parameter(torch.ones(8))
    state = DistributedLion([weight]).state_dict()
    state["param_groups"][0]["step"] = 2 * rank
    optimizer = DistributedLion([weight])
    optimizer.load_state_dict(state)
    weight.grad = torch.linspace(1, 2 + rank, 8)
    optimizer.step()


def sparse_gradient(rank: int, ranks: tuple[int, ...]) -> None:
    embedding = torch.nn.Embedding(5, 4, sparse=rank in ranks)
    torch.nn.init.ones_(embedding.weight)
    embedding(torch.tensor([rank])).sum().backward()
    DistributedLion(embedding.parameters()).step()


def bad_gradient(rank: int, value: float, on_bad_gradient: str, ranks: tuple[int, ...]) -> None:
    weight = Parameter(torch.ones(8))
    weight.grad = torch.linspace(1, 2 + rank, 8)
    if rank in ranks:
        weight.grad[3] = value
    DistributedLion([("weight", weight)], on_bad_gradient=on_bad_gradient).step()


def plain_loop(rank: int, local: bool, same_data: bool) -> None:
    from hf_dlion import keep_gradients_local

    model = DistributedDataParallel(torch.nn.Linear(5, 2))
    if local:
        keep_gradients_local(model)
    inputs = torch.randn(3, 5, generator=torch.Generator().manual_seed(0 if same_data else rank))
    model(inputs).pow(2).mean().backward()
    DistributedLion(model.parameters()).step()


def train(rank: int, options: list[dict[str, Any]], gpus: int = 0) -> None:
    from hf_dlion import DLionTrainer  # here, since the other cases need not wait for transformers
    from tests.trainer import tiny

    tiny.act_as_launched(rank)
    arguments = tiny.arguments("unused", max_steps=3, **options[rank])
    if gpus:
        type(arguments).n_gpu = property(lambda _: gpus)  # type: ignore[assignment]
    DLionTrainer(model=tiny.model(), args=arguments, train_dataset=tiny.rows()).train()


def foreign_optimizer(rank: int) -> None:
    from hf_dlion import DLionTrainer
    from tests.trainer import tiny

    tiny.act_as_launched(rank)
    model = tiny.model()
    optimizers = torch.optim.SGD(model.parameters()), None
    arguments = tiny.arguments("unused", max_steps=3)
    DLionTrainer(model=model, args=arguments, train_dataset=tiny.rows(), optimizers=optimizers).train()


def differ(*options: dict[str, Any]) -> tuple[list[dict[str, Any]]]:
    return (list(options),)


AVERAGED = ["averaged before the step", "hf_dlion.keep_gradients_local", "was given the same data"]
ANOTHER = "the ranks do not optimize the same parameters in the same way"
SETTING = "the ranks have different hyperparameters"

CASES: dict[str, tuple[Callable[..., None], tuple[Any, ...], list[str]]] = {
    "betas": (step, differ({}, {"betas": (0.9, 0.98)}), [SETTING, "betas of param group 0 is (0.9, 0.99) on rank 0"]),
    "weight_decay": (step, differ({}, {"weight_decay": 0.1}), [SETTING, "weight_decay", "0.0 on rank 0 and 0.1 on"]),
    "lr": (step, differ({}, {"lr": 0.1}), [SETTING, "lr of param group 0 is 0.0001 on rank 0 and 0.1 on rank 1"]),
    "momentum": (step, (*differ({"momentum": 0.9}, {"momentum": 0.5}), "terngrad"), [SETTING, "momentum"]),
    "exchange": (
        step,
        differ({}, {"exchange": "gather"}),
        [ANOTHER, "exchange is auto on rank 0 and gather on rank 1"],
    ),
    "aggregation": (step, differ({}, {"aggregation": "avg"}), [ANOTHER, "aggregation is mavo on rank 0 and avg on"]),
    "on_bad_gradient": (step, differ({}, {"on_bad_gradient": "raise"}), [ANOTHER, "on_bad_gradient is abstain on"]),
    "check_replicas": (
        step,
        differ({}, {"check_replicas_steps": 5}),
        [ANOTHER, "check_replicas_steps is 100 on rank 0"],
    ),
    "method": (other_method, (), [ANOTHER, "method is DistributedLion on rank 0 and GlobalLion on rank 1"]),
    "foreign optimizer": (foreign_optimizer, (), ["optim='dlion_mavo', and an optimizer of class SGD was given"]),
    "dtype": (other_dtype, (), [ANOTHER, "parameter 0 is float32 (8,)", "bfloat16 (8,)"]),
    "groups": (other_groups, (), [ANOTHER, "the number of param groups is 1 on rank 0 and 2 on rank 1"]),
    "step": (other_step, (), [SETTING, "step of param group 0 is 0 on rank 0 and 2 on rank 1"]),
    "complex": (complex_parameter, (), ["parameter has dtype torch.complex64", "Leave others out of the optimizer"]),
    "sparse": (sparse_gradient, ((0, 1),), ["layout torch.sparse_coo", "nn.Embedding(sparse=False)"]),
    "inf": (bad_gradient, (float("inf"), "raise", (1,)), ["rank 1: the gradient of parameter 0 (weight)", "at step 0"]),
    "nan": (bad_gradient, (float("nan"), "abstain", (0, 1)), ["rank 0: the gradient of parameter 0 (weight)"]),
    "averaged": (plain_loop, (False, False), AVERAGED),
    "same data": (plain_loop, (True, True), AVERAGED),
    "unknown optim": (train, ([{"optim": "dlion_mvo"}] * 2,), ["Did you mean 'dlion_mavo'?", "adamw_torch"]),
    "GPUs": (train, ([{}] * 2, 2), ["with 2 GPUs in one process", "accelerate launch --multi_gpu"]),
    "fsdp": (train, ([{"fsdp": True}] * 2,), ["with fsdp on CPUs: accelerate shards on GPUs only"]),
    "learning_rate": (
        train,
        ([{}, {"learning_rate": 1e-3}],),
        [SETTING, "lr of param group 0 is 0.003 on rank 0 and 0.001 on rank 1"],
    ),
    "optim": (train, ([{}, {"optim": "dlion_avg"}],), [ANOTHER, "aggregation is mavo on rank 0 and avg on rank 1"]),
    "schedule": (train, ([{}, {"lr_scheduler_type": "cosine"}],), [SETTING, "lr of param group 0"]),
}


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_say_it_and_fail(case: str) -> None:
    function, arguments, parts = CASES[case]
    for rank, outcome in enumerate(run_to_their_ends(function, 2, *arguments, timeout=100)):
        assert outcome.exit_code == 1
        for part in parts:
            assert part in str(outcome.error), f"rank {rank}: {outcome.error}"


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [(sparse_gradient, ((1,),), "nn.Embedding(sparse=False)"), (step, differ({}, {"lr": -1.0}), "lr=-1.0: it cannot")],
)
def test_where_only_one_rank_can_know_the_other_names_it(
    function: Callable[..., None], arguments: tuple[Any, ...], said: str
) -> None:
    other, wrong = run_to_their_ends(function, 2, *arguments, timeout=100)
    assert said in str(wrong.error)
    assert f"{LOST}{'rank 1 did not answer' if CAN_NAME else ''}" in str(other.error)
    assert (other.exit_code, wrong.exit_code) == (1, 1)


LAUNCHED = """
import os
import torch
import torch.distributed as dist
from hf_dlion import DistributedLion

dist.init_process_group("gloo")
weight = torch.nn.Parameter(torch.ones(8))
weight.grad = torch.linspace(1, 2 + dist.get_rank(), 8)
DistributedLion([weight], lr=0.1 * (1 + dist.get_rank())).step()
"""


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (LAUNCHED, "lr of param group 0 is 0.1 on rank 0 and 0.2 on rank 1. Set them"),
        (
            LAUNCHED.replace('dist.init_process_group("gloo")', "").replace("dist.get_rank()", "0"),
            "each would train for",
        ),
    ],
)
def test_a_launcher_sees_it(script: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "step.py"
    path.write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert said in done.stderr
