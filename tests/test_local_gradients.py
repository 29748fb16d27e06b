"""keep_gradients_local in plain Accelerate and DDP loops, over real processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

from hf_dlion import DistributedLion, keep_gradients_local
from hf_dlion.local_gradients import check_supported
from hf_dlion.optim.virtual import VirtualWorkers
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


def ddp_module(rank: int, static_graph: bool) -> None:
    model = DistributedDataParallel(torch.nn.Linear(5, 2, bias=False), static_graph=static_graph)
    keep_gradients_local(model)
    before = own_gradient(model.module, rank, 1)
    for _ in range(3):
        model.zero_grad()
        model(inputs(rank)).pow(2).mean().backward()
        assert torch.allclose(model.module.weight.grad, before, atol=1e-6)


@pytest.mark.parametrize("static_graph", [False, True])
def test_a_ddp_module(static_graph: bool) -> None:
    run_workers(ddp_module, 2, static_graph)


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


def two_layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def said(loop: Callable[[], Any]) -> str:
    try:
        loop()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def optimizers_of_parts(rank: int) -> list[str]:
    """What is said of a model of two layers whose second has another optimizer, or none."""

    def loop(second: Callable[[torch.nn.Module], Any], steps: int = 3) -> list[torch.Tensor]:
        model = two_layers()
        wrapped = DistributedDataParallel(model)
        keep_gradients_local(wrapped)
        optimizers = [DistributedLion(model[0].parameters(), lr=0.1), second(model[2])]
        for step in range(steps):
            wrapped(inputs(rank, step)).pow(2).mean().backward()
            for optimizer in filter(None, optimizers):
                optimizer.step()
                optimizer.zero_grad()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [parameter.detach() for parameter in model.parameters()])
        assert all(map(torch.equal, *everyone))
        return everyone[rank]

    own = loop(lambda layer: DistributedLion(layer.parameters(), lr=0.1))
    whole = two_layers()
    assert not any(map(torch.equal, own, whole.parameters()))
    loop(lambda layer: layer.requires_grad_(False) and None)
    return [
        said(lambda: loop(lambda layer: torch.optim.AdamW(layer.parameters()))),
        said(lambda: loop(lambda layer: torch.optim.SGD([layer.bias], lr=0.1))),
        said(lambda: loop(lambda layer: None)),
    ]


def test_every_trained_parameter_is_voted_on_or_named() -> None:
    for another, bias, nobody in run_workers(optimizers_of_parts, 2):
        assert another.startswith("AdamW would step 2.weight with the gradient of this worker alone")
        assert bias.startswith("SGD would step 2.bias with the gradient of this worker alone")
        assert nobody.startswith(
            "2.weight is trained, and in no optimizer of hf_dlion, so nobody votes on its gradient"
        )
        assert "nor on those of 1 more" in nobody


def unfrozen_later(rank: int) -> list[str]:
    """What is said where the second of two layers is frozen at first, and the fourth step is the first to train it."""

    def loop(second: Callable[[torch.nn.Module], Any], then: Callable[[Any, torch.nn.Module], Any]) -> None:
        model = two_layers()
        model[2].requires_grad_(False)
        wrapped = DistributedDataParallel(model)
        keep_gradients_local(wrapped)
        optimizers = [DistributedLion(model[0].parameters(), lr=0.1), second(model[2])]
        for step in range(6):
            if step == 3:
                model[2].requires_grad_(True)
                then(optimizers, model[2])
            wrapped(inputs(rank, step)).pow(2).mean().backward()
            for optimizer in filter(None, optimizers):
                optimizer.step()
                optimizer.zero_grad()

    def add(optimizers: Any, layer: torch.nn.Module) -> None:
        optimizers[-1 if optimizers[-1] else 0].add_param_group({"params": list(layer.parameters())})

    elsewhere = torch.nn.Parameter(torch.ones(1))
    return [
        said(lambda: loop(lambda layer: None, add)),
        said(lambda: loop(lambda layer: torch.optim.AdamW(layer.parameters()), lambda *_: None)),
        said(lambda: loop(lambda layer: torch.optim.AdamW([elsewhere]), add)),
        said(lambda: loop(lambda layer: None, lambda *_: None)),
    ]


def test_what_is_unfrozen_later_is_voted_on_or_named() -> None:
    for ours, theirs, added, nobody in run_workers(unfrozen_later, 2):
        assert ours == "nothing"
        for another in (theirs, added):
            assert another.startswith("AdamW would step 2.weight with the gradient of this worker alone")
        assert nobody.startswith("2.weight is trained, and in no optimizer of hf_dlion")


def critic_before_generator(rank: int) -> tuple[str, str]:
    """What is said where one part steps three times as often as another, and where a third one is left."""

    def loop(model: torch.nn.Sequential) -> None:
        wrapped = DistributedDataParallel(model)
        keep_gradients_local(wrapped)
        generator, critic = (DistributedLion(model[i].parameters(), lr=0.1) for i in (0, 2))
        for step in range(6):
            wrapped(inputs(rank, step)).pow(2).mean().backward()
            critic.step()
            critic.zero_grad()
            if step % 3 == 2:
                generator.step()
                generator.zero_grad()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [parameter.detach() for parameter in model.parameters()])
        assert all(map(torch.equal, *everyone))

    larger = two_layers().append(torch.nn.Linear(2, 2))
    return said(lambda: loop(two_layers())), said(lambda: loop(larger))


def test_an_optimizer_that_steps_later_votes_on_its_own() -> None:
    for both, third in run_workers(critic_before_generator, 2):
        assert both == "nothing"
        assert third.startswith("3.weight is trained, and in no optimizer of hf_dlion")


def replaced_entirely(rank: int) -> list[str]:
    def loop() -> None:
        act_as_launched(rank)
        accelerator = Accelerator(cpu=True)
        keep_gradients_local(accelerator)
        model = two_layers()
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        accelerator.backward(model(inputs(rank)).pow(2).mean())
        optimizer.step()

    return [said(loop)]


def test_another_optimizer_alone_is_refused() -> None:
    for [message] in run_workers(replaced_entirely, 2):
        assert "AdamW would step 0.weight" in message


class Experts(torch.nn.Module):
    """Two experts, of which a forward takes one; a mask that is no part of the state; and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = torch.nn.Linear(5, 8), torch.nn.Linear(8, 2)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))
        self.norm = torch.nn.BatchNorm1d(8)
        self.register_buffer("mask", torch.ones(8), persistent=False)

    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return self.outer(self.experts[expert](torch.tanh(self.inner(x))) * self.mask)


def expert_of(rank: int, step: int) -> int:
    return step % 2 if step > 3 else (rank + step) % 2


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"gradient_as_bucket_view": True}])
def test_an_expert_that_was_not_reached_has_no_gradient(options: dict[str, bool]) -> None:
    model = Experts()
    virtual = VirtualWorkers(model.parameters(), 2, DistributedLion, lr=1e-2)
    for step in range(6):
        for rank in range(2):
            model(inputs(rank, step), expert_of(rank, step)).pow(2).mean().backward()
            virtual.next_worker()
        virtual.step()
    for parameters in run_workers(experts_in_turns, 2, options):
        assert all(map(torch.equal, parameters, model.parameters()))


def experts_in_turns(rank: int, options: dict[str, bool]) -> list[torch.Tensor]:
    model = Experts()
    wrapped = DistributedDataParallel(model, **options)
    keep_gradients_local(wrapped)
    optimizer = DistributedLion(model.parameters(), lr=1e-2)
    for step in range(6):
        wrapped(inputs(rank, step), expert_of(rank, step)).pow(2).mean().backward()
        assert model.experts[1 - expert_of(rank, step)].weight.grad is None
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


class Normed(Experts):
    def forward(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        return self.norm(self.inner(x)) * self.mask


def running_means(rank: int) -> list[list[Any]]:
    """When each forward begins, with gradients kept local and averaged; and how many buffers are sent."""
    return [means_of(rank, local) for local in (True, False)]


def means_of(rank: int, local: bool) -> list[Any]:
    model = Normed()
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    if local:
        keep_gradients_local(wrapped)
    means: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda *_: means.append(model.norm.running_mean.clone()))  # type: ignore[union-attr, operator]
    for step in range(5):
        training = step != 2
        wrapped.train(training)
        with torch.set_grad_enabled(training):
            output = wrapped(inputs(rank, step), 0)
        if training:
            output.pow(2).mean().backward()
    return [means, len(wrapped.modules_buffers)]


def test_buffers_of_the_state_are_sent_as_by_ddp_and_constants_are_not() -> None:
    for (local, sent), (averaged, by_ddp) in run_workers(running_means, 2):
        assert all(map(torch.equal, local, averaged))
        assert sent == by_ddp - 1


def under_join(rank: int) -> str:
    model = DistributedDataParallel(torch.nn.Linear(5, 2))
    keep_gradients_local(model)

    def loop() -> None:
        with Join([model]):
            for step in range(3 - rank):
                model(inputs(rank, step)).pow(2).mean().backward()

    return said(loop)


def test_join_is_refused_at_once() -> None:
    for message in run_workers(under_join, 2):
        assert message.startswith("torch's Join (accelerate's join_uneven_inputs) and votes do not go together")


def alone_among_two(rank: int) -> None:
    with pytest.raises(ValueError, match=r"2 processes were launched together.*knows of 1.*Accelerator\(cpu=True\)"):
        keep_gradients_local(Accelerator())  # without a GPU, and not told to compute on the CPU


def test_an_accelerator_that_knows_of_no_other_process_is_refused() -> None:
    run_workers(alone_among_two, 2)


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
