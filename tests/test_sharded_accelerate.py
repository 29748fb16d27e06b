"""Replicas that accelerate shards, over gloo.

accelerate shards on GPUs only: here its state is told that it does, after which all of its own code runs on the CPU.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import GPT2LMHeadModel, Trainer

from hf_dlion import (
    DistributedLion,
    DLionTrainer,
    DLionTrainerMixin,
    LionTheoryCallback,
    keep_gradients_local,
    load_workers,
    local_gradients,
    save_workers,
    vote_gradients,
)
from hf_dlion.local_gradients import check_supported
from hf_dlion.optim.tensors import local
from hf_dlion.trainer.report import run_report
from tests.harness import run_workers, what_is_logged
from tests.trainer.tiny import act_as_launched, arguments, rows
from tests.trainer.tiny import model as tiny

of_new_accelerate = pytest.mark.skipif(
    transformers.__version__ >= "5" and not hasattr(ParallelismConfig, "sp_backend"),
    reason="this Trainer takes no parallelism_config of an accelerate before 1.12",
)


def pretend(accelerator: Accelerator, replicas: int = 2, shards: int = 2, **plugin: Any) -> Accelerator:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # where there are GPUs, accelerate would have its barriers there
    state: Any = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", **plugin)
    # Every AcceleratorState takes over what PartialState has.
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.parallelism_config = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
    state.device_mesh = state.parallelism_config.get_device_mesh("cpu")
    return accelerator


def prepared(rank: int, steps: int, **plugin: Any) -> tuple[Accelerator, Any, Any]:
    act_as_launched(rank)
    torch.manual_seed(0)
    AcceleratorState._reset_state(reset_partial_state=True)  # older ones cannot make another that shards
    accelerator = pretend(Accelerator(cpu=True, gradient_accumulation_steps=steps), **plugin)
    keep_gradients_local(accelerator)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    group = accelerator.torch_device_mesh["dp_replicate"].get_group()
    optimizer = DistributedLion(model.parameters(), lr=0.1, process_group=group, check_replicas_steps=1)
    assert accelerator.torch_device_mesh.ndim == 2
    return accelerator, *accelerator.prepare(model, optimizer)


def loop(rank: int) -> list[torch.Tensor]:
    accelerator, model, optimizer = prepared(rank, 2)
    own = []
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + rank)
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(4, 5, generator=generator)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            if step == 1:
                own = [parameter.grad.full_tensor() for parameter in model.parameters()]
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.param_groups[0]["step"] == 3
    return [*own, *(parameter.full_tensor().detach() for parameter in model.parameters())]


def test_a_loop_of_accelerate() -> None:
    first, second, third, fourth = run_workers(loop, 4)
    for index in range(4):  # gradients
        assert torch.equal(first[index], second[index])
        assert torch.equal(third[index], fourth[index])
        assert not torch.equal(first[index], third[index])
    for index in range(4, 8):
        assert torch.equal(first[index], third[index])


def step_on(rank: int, accelerator: Accelerator, model: Any, optimizer: Any, steps: range) -> list[torch.Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + rank)
        accelerator.backward(model(torch.randn(4, 5, generator=generator)).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.full_tensor().detach().clone() for parameter in model.parameters()]


def saved_by_accelerate(rank: int, folder: str) -> dict[tuple[str, bool], tuple[bool, bool, int]]:
    """By kind of state dict, and whether ours is saved beside it: whether momentum and end are the same; warnings."""
    found, said = {}, what_is_logged()
    for kind in ("SHARDED_STATE_DICT", "FULL_STATE_DICT"):
        into = f"{folder}/{kind}"
        accelerator, model, optimizer = prepared(rank, 1, state_dict_type=kind)
        step_on(rank, accelerator, model, optimizer, range(3))
        accelerator.save_state(into)
        save_workers(into, optimizer)
        momenta = [state["momentum"].clone() for state in optimizer.optimizer.state.values()]
        end = step_on(rank, accelerator, model, optimizer, range(3, 6))
        for ours in (True, False):
            accelerator.free_memory()
            accelerator, model, optimizer = prepared(rank, 1, state_dict_type=kind)
            said.clear()
            accelerator.load_state(into)
            warnings = [one for one in said if "hf_dlion.load_workers, called after this" in one]
            if ours:
                load_workers(into, optimizer)
            own = [state["momentum"] for state in optimizer.optimizer.state.values()]
            same = all(map(torch.equal, momenta, own))
            again = step_on(rank, accelerator, model, optimizer, range(3, 6))
            found[kind, ours] = same, all(map(torch.equal, end, again)), len(warnings)
    return found


def test_save_state_with_ours_beside_it_is_exact_and_alone_warns(tmp_path: Path) -> None:
    everyone = run_workers(saved_by_accelerate, 4, str(tmp_path), timeout=200)
    for kind, ours in everyone[0]:
        outcomes = [found[kind, ours] for found in everyone]
        assert all(same and end for same, end, _ in outcomes) == ours
        assert any(warned for *_, warned in outcomes)


@pytest.mark.parametrize(
    ("version", "sizes", "message"),
    [
        (1, (2, 2), "FSDP version 1.*fsdp_version to 2.*sharded_replicas.yaml"),
        (2, (1, 4), "dp_replicate_size=1 and dp_shard_size=4"),
        (2, None, "dp_replicate_size=1 and dp_shard_size=1"),
        (2, (2, 2, 2), "tensor, context or sequence parallelism"),
    ],
)
def test_what_fsdp_cannot_do_here(version: int, sizes: tuple[int, ...] | None, message: str) -> None:
    class Sharding:
        distributed_type = DistributedType.FSDP
        parallelism_config = sizes and ParallelismConfig(sizes[0], sizes[1], *sizes[2:])
        state = type("State", (), {"fsdp_plugin": type("Plugin", (), {"fsdp_version": version})})

    with pytest.raises(ValueError, match=message):
        check_supported(Sharding())  # type: ignore[arg-type]


@pytest.mark.parametrize(("efficient", "old"), itertools.product((True, False), (True, False)))
def test_weights_that_would_reach_one_replica_only(efficient: bool, old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharding:
        distributed_type = DistributedType.FSDP
        parallelism_config = ParallelismConfig(2, 2)
        plugin = type("Plugin", (), {"fsdp_version": 2, "cpu_ram_efficient_loading": efficient})
        state = type("State", (), {"fsdp_plugin": plugin})

    monkeypatch.setattr(local_gradients, "compare_versions", lambda *_: old)
    if efficient and old:
        with pytest.raises(ValueError, match="inside the first replica only. Update accelerate"):
            check_supported(Sharding())  # type: ignore[arg-type]
    else:
        check_supported(Sharding())  # type: ignore[arg-type]


class OnCpu:
    """Between our mixin and the Trainer: its accelerator is told that it shards."""

    args: Any
    accelerator: Any

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        pretend(self.accelerator, state_dict_type="FULL_STATE_DICT")
        self.is_fsdp_enabled = True


class ShardedTrainer(DLionTrainerMixin, OnCpu, Trainer):
    pass


def voted(rank: int) -> list[torch.Tensor]:
    """AdamW behind votes on gradients, in a loop of accelerate."""
    act_as_launched(rank)
    torch.manual_seed(0)
    accelerator = pretend(Accelerator(cpu=True, gradient_accumulation_steps=2))
    with pytest.raises(ValueError, match="keep_gradients_local.accelerator., then accelerator.prepare"):
        vote_gradients(accelerator)
    keep_gradients_local(accelerator)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    accelerator.backward(model(torch.ones(4, 5)).square().mean())
    with pytest.raises(RuntimeError, match="the replicas would come apart.*vote_gradients.model, process_group"):
        optimizer.step()
    optimizer.zero_grad()
    group = accelerator.torch_device_mesh["dp_replicate"].get_group()
    accelerator.scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="there is a gradient scaler"):
        vote_gradients(model, process_group=group)
    accelerator.scaler = None
    votes = vote_gradients(model, process_group=group)
    for step in range(6):
        generator = torch.Generator().manual_seed(10 * step + rank)
        with accelerator.accumulate(model):
            accelerator.backward(model(torch.randn(4, 5, generator=generator)).square().mean())
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert votes is not None
    assert votes.step == 3
    return [parameter.full_tensor().detach() for parameter in model.parameters()]


def test_votes_on_gradients_in_a_loop_of_accelerate() -> None:
    everyone = run_workers(voted, 4)
    for weights in everyone[1:]:
        assert all(map(torch.equal, weights, everyone[0]))


def voting_trainer(rank: int, folder: str) -> tuple[list[torch.Tensor], list[dict[str, float]], dict[str, Any]]:
    act_as_launched(rank)
    options: dict[str, Any] = {"optim": "adamw_torch", "gradient_votes": "avg", "learning_rate": 1e-2}
    options |= {"max_steps": 30, "logging_steps": 10, "gradient_accumulation_steps": 2, "bf16": True}
    options |= {"eval_strategy": "steps", "eval_steps": 20, "eval_on_start": True}
    run = ShardedTrainer(model=tiny(), args=arguments(folder, **options), train_dataset=rows(), eval_dataset=rows(8))
    run.train()
    assert run.voting is not None
    assert run.voting.ledger.steps == 30
    assert run.optimizer is not None
    shards = [local(p).clone() for group in run.optimizer.param_groups for p in group["params"]]
    return shards, [one for one in run.state.log_history if "grad_norm" in one], run_report(run)


@of_new_accelerate
def test_a_trainer_votes_on_gradients(tmp_path: Path) -> None:
    everyone = run_workers(voting_trainer, 4, str(tmp_path), timeout=300)
    for rank, (shards, logs, report) in enumerate(everyone):
        assert all(map(torch.equal, shards, everyone[(rank + 2) % 4][0]))
        assert logs[-1]["loss"] < logs[0]["loss"]
        assert 0.5 < logs[-1]["bits_sent_per_param"] < 1
        assert (report["workers"], report["processes"], report["gradient_votes"]) == (2, 4, "avg")


def shards_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.to_local().clone() for parameter in model.parameters()]  # type: ignore[attr-defined]


def train(rank: int, folder: str, optim: str, local_steps: int) -> dict[str, Any]:
    """Four steps at once, and two and two, with a checkpoint between them."""
    act_as_launched(rank)
    found: dict[str, Any] = {}
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "max_grad_norm": 0.01}
    options["local_steps"] = local_steps
    for name, checkpoint in (("whole", None), ("resumed", f"{folder}/whole/checkpoint-2")):
        own = arguments(f"{folder}/{name}", optim=optim, check_replicas_steps=1, **options)
        callbacks = [LionTheoryCallback(every=1)] if optim == "dlion_mavo" else []
        run = ShardedTrainer(model=tiny(), args=own, train_dataset=rows(), callbacks=callbacks)
        run.train(resume_from_checkpoint=checkpoint)
        logs = [entry for entry in run.state.log_history if "grad_norm" in entry]
        found[name] = shards_of(run.model), [entry["grad_norm"] for entry in logs]
        found["log"], found["report"] = logs[-1], run_report(run)
        optimizer = run.optimizer.optimizer
        states = (optimizer.inner or optimizer).state.values()
        found["state"] = [local(state["exp_avg" if local_steps else "momentum"]).clone() for state in states]
    whole, resumed = found["whole"], found["resumed"]
    assert all(map(torch.equal, whole[0], resumed[0]))
    assert whole[1] == resumed[1]  # with the log of before
    saved = GPT2LMHeadModel.from_pretrained(f"{folder}/whole/checkpoint-4")
    full = [parameter.full_tensor() for parameter in run.model.parameters()]  # type: ignore[attr-defined]
    assert all(map(torch.equal, saved.parameters(), full))
    return found


@of_new_accelerate
@pytest.mark.parametrize(("optim", "local_steps"), [("dlion_mavo", 0), ("dmuon_avg", 0), ("adamw_torch", 3)])
def test_a_trainer_goes_on_where_it_stopped(optim: str, local_steps: int, tmp_path: Path) -> None:
    everyone = run_workers(train, 4, str(tmp_path), optim, local_steps, timeout=300)
    for rank, found in enumerate(everyone):
        same, other = everyone[(rank + 2) % 4], everyone[rank ^ 1]
        assert all(map(torch.equal, found["whole"][0], same["whole"][0]))
        assert not all(map(torch.equal, found["state"], same["state"]))
        assert found["log"]["grad_norm"] == other["log"]["grad_norm"]
        assert (found["report"]["workers"], found["report"]["processes"]) == (2, 4)
        if not local_steps:
            assert found["report"]["fp32_allreduce_over_sent"] * found["log"]["fp32_allreduce_ratio"] == pytest.approx(
                1, rel=0.1
            )
            assert 0.5 < found["log"]["bits_sent_per_param"] < 0.8  # half of a bit, and a small model's padding
            assert 1 / 32 < found["log"]["fp32_allreduce_ratio"] < 1 / 20
        assert found["log"].get("lion_box_distance") == same["log"].get("lion_box_distance")
        assert ("lion_surrogate" in found["log"]) == (optim == "dlion_mavo")


def test_a_model_that_was_loaded_in_shards_is_refused(tmp_path: Path) -> None:
    run = DLionTrainer(model=tiny(), args=arguments(tmp_path), train_dataset=rows())
    run.is_distributed_loading_by_transformers = True
    with pytest.raises(ValueError, match="loaded in shards.*sharded_replicas.yaml"):
        run.create_optimizer()
