"""keep_gradients_local in plain Accelerate and DDP loops, over real processes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.nn.parallel import DistributedDataParallel

from hf_dlion import DistributedLion, keep_gradients_local
from hf_dlion.local_gradients import check_supported
from tests.harness import run_workers
from tests.trainer.tiny import act_as_launched


def inputs(rank: int, micro_batch: int = 0) -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(10 * rank + micro_batch))


def own_gradient(model: torch.nn.Module, rank: int, micro_batches: int) -> torch.Tensor:
    weight = model.weight.detach().clone().requires_grad_()
    for i in range(micro_batches):
        (torch.nn.functional.linear(inputs(rank, i), weight).pow(2).mean() / micro_batches).backward()
    assert weight.grad is not None
    return weight.grad


def accelerate_loop(rank: int, accumulation: int) -> None:
    act_as_launched(rank)
    torch.manual_seed(rank)  # DDP sends rank 0's weights to all
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    keep_gradients_local(accelerator)
    model = torch.nn.Linear(5, 2, bias=False)
    model, optimizer = accelerator.prepare(model, DistributedLion(model.parameters(), lr=0.1))
    for step in range(3):
        before = own_gradient(model.module, rank, accumulation)
        for i in range(accumulation):
            with accelerator.accumulate(model):
                accelerator.backward(model(inputs(rank, i)).pow(2).mean())
                if accelerator.sync_gradients:
                    assert torch.allclose(model.module.weight.grad, before, atol=1e-6), f"not its own, step {step}"
                optimizer.step()
                optimizer.zero_grad()
        everyone = [torch.empty_like(before) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, model.module.weight.detach())
        assert all(torch.equal(other, everyone[0]) for other in everyone)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_accelerate_loop(accumulation: int) -> None:
    run_workers(accelerate_loop, 2, accumulation)


def ddp_module(rank: int) -> None:
    model = DistributedDataParallel(torch.nn.Linear(5, 2, bias=False))
    keep_gradients_local(model)
    before = own_gradient(model.module, rank, 1)
    model(inputs(rank)).pow(2).mean().backward()
    assert torch.allclose(model.module.weight.grad, before, atol=1e-6)


def test_a_ddp_module() -> None:
    run_workers(ddp_module, 2)


def forgotten(rank: int) -> str:
    act_as_launched(rank)
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Linear(5, 2, bias=False)
    model, optimizer = accelerator.prepare(model, DistributedLion(model.parameters()))
    accelerator.backward(model(inputs(rank)).pow(2).mean())
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_averaged_gradients_are_found() -> None:
    for message in run_workers(forgotten, 2):
        assert "averaged before the step (DDP still all-reduces: call hf_dlion.keep_gradients_local" in message


def sharded_on_cpus(rank: int) -> str:
    act_as_launched(rank)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    with pytest.raises(ValueError, match="shards on GPUs only") as caught:
        keep_gradients_local(Accelerator(cpu=True))
    return str(caught.value)


def test_fsdp_on_cpus_is_refused() -> None:
    run_workers(sharded_on_cpus, 2)


def too_late(rank: int) -> str:
    act_as_launched(rank)
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(5, 2))
    with pytest.raises(ValueError, match="before accelerator.prepare") as caught:
        keep_gradients_local(accelerator)
    return str(caught.value)


def test_after_prepare_is_too_late() -> None:
    run_workers(too_late, 2)


def test_what_ddp_was_told_is_kept() -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=7)])
    keep_gradients_local(accelerator)
    assert accelerator.ddp_handler is not None
    assert accelerator.ddp_handler.bucket_cap_mb == 7


def test_a_compressing_hook_is_refused() -> None:
    hook = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
    with pytest.raises(ValueError, match="communication hook 'fp16'"):
        keep_gradients_local(Accelerator(cpu=True, kwargs_handlers=[hook]))


def test_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="was given a Linear"):
        keep_gradients_local(torch.nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_sharded_training_is_refused(kind: str) -> None:
    class Sharding:
        distributed_type: Any = type("Kind", (), {"value": kind})()
        parallelism_config = None

    with pytest.raises(ValueError, match=f"asked to run under {kind}.*one process per GPU"):
        check_supported(Sharding())  # type: ignore[arg-type]
