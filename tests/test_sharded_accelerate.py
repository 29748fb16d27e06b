"""Replicas that accelerate shards, over gloo.

accelerate shards on GPUs only: here its state is told that it does, after which all of its own code runs on the CPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from hf_dlion import DistributedLion, keep_gradients_local
from hf_dlion.local_gradients import check_supported
from tests.harness import run_workers
from tests.trainer.tiny import act_as_launched


def pretend(accelerator: Accelerator, replicas: int = 2, shards: int = 2, **plugin: Any) -> Accelerator:
    state: Any = accelerator.state
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", **plugin)
    state.distributed_type = DistributedType.FSDP
    state.parallelism_config = ParallelismConfig(dp_replicate_size=replicas, dp_shard_size=shards)
    state.device_mesh = state.parallelism_config.get_device_mesh("cpu")
    return accelerator


def loop(rank: int) -> list[torch.Tensor]:
    act_as_launched(rank)
    torch.manual_seed(0)
    accelerator = pretend(Accelerator(cpu=True, gradient_accumulation_steps=2))
    keep_gradients_local(accelerator)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    group = accelerator.torch_device_mesh["dp_replicate"].get_group()
    optimizer = DistributedLion(model.parameters(), lr=0.1, process_group=group, check_replicas_steps=1)
    assert accelerator.torch_device_mesh.ndim == 2
    model, optimizer = accelerator.prepare(model, optimizer)
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
