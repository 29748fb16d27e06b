"""vote_gradients against a plain reference, over real processes and in turns, at tolerance zero."""

from __future__ import annotations

import gc
import itertools
import logging
import weakref
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from hf_dlion import DistributedLion, keep_gradients_local, vote_gradients
from hf_dlion.bits.dither import EAGER
from hf_dlion.bits.hashing import digest
from hf_dlion.bits.native import NATIVE_FROM
from hf_dlion.gradient_votes import VotedGradients, _voting
from hf_dlion.optim import signed_gradients
from hf_dlion.optim.signed_gradients import VirtualGradients
from tests.harness import run_workers, what_is_logged
from tests.trainer.tiny import act_as_launched

# Sizes that fill no word and several chunks; the fourth is laid out channels last.
SHAPES = [(7,), (33, 41), (), (4, 3, 2, 2), (131, 1601)]
NOTHING, NOBODY, NOT_RANK_0 = 0, 2, 3
STEPS = 3


class Model(torch.nn.Module):
    """Whose gradients are what is passed in; a parameter that gets None is not reached."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        drawn = [torch.zeros(shape, dtype=dtype) for shape in SHAPES]
        drawn[3] = drawn[3].to(memory_format=torch.channels_last)
        self.weights = torch.nn.ParameterList(drawn)

    def forward(self, gradients: list[torch.Tensor | None]) -> Any:
        pairs = zip(self.weights, gradients, strict=True)
        return sum((weight * gradient).sum() for weight, gradient in pairs if gradient is not None)


def gradients(rank: int, step: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor | None]:
    """Random, of sizes of their own, and a third of them zero. In the second step some parameters are not reached."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    drawn: list[torch.Tensor | None] = []
    for shape in SHAPES:
        gradient = torch.randn(shape, generator=generator) * (1 + rank)
        drawn.append((gradient * (torch.rand(shape, generator=generator) > 1 / 3)).to(dtype))
    drawn[NOTHING] = torch.zeros_like(drawn[NOTHING]) if step == 2 else drawn[NOTHING]  # type: ignore[arg-type]
    if step == 1:
        drawn[NOBODY] = None
        drawn[NOT_RANK_0] = drawn[NOT_RANK_0] if rank else None
    return drawn


def noise(step: int, rank: int, parameter: int, elements: np.ndarray) -> np.ndarray:
    hashed = elements.astype(np.uint32) ^ np.uint32(digest((step, rank, parameter)) & 0x7FFFFFFF)
    hashed = (hashed ^ (hashed >> np.uint32(16))) * np.uint32(0x7FEB352D)
    hashed = (hashed ^ (hashed >> np.uint32(15))) * np.uint32(0x846CA68B)
    return (hashed ^ (hashed >> np.uint32(16))).astype(np.int32).astype(np.float32) * np.float32(2.0**-31)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """In the order of memory."""
    return tensor.permute(0, 2, 3, 1).flatten() if tensor.dim() == 4 else tensor.flatten()


def decision(
    own: dict[int, torch.Tensor | None],
    step: int,
    parameter: int,
    aggregation: str = "avg",
    dither: bool = True,
    sources: int = 0,
) -> torch.Tensor | None:
    """What workers decide of one parameter, by their flat gradients; None where none has one.

    ``sources`` is added to the number of a worker to seed its noise.
    """
    size = next((len(gradient) for gradient in own.values() if gradient is not None), None)
    if size is None:
        return None
    total, sizes, elements = np.float32(0), np.float32(0), np.arange(size)
    for rank, gradient in own.items():
        g = torch.zeros(size) if gradient is None else gradient.float()
        rms = np.float32(torch.linalg.vector_norm(g) / torch.tensor(max(size, 1) ** 0.5))
        drawn = np.float32(2 * rms) * noise(step, rank + sources, parameter, elements) if dither else np.float32(0)
        zeros = np.where((elements + rank + step) % 2 == 1, 1, -1)
        total = total + np.where(g.numpy() == 0, zeros, np.where(g.numpy() + drawn > 0, 1, -1)).astype(np.float32)
        sizes = sizes + rms
    voted = total / np.float32(len(own)) if aggregation == "avg" else np.sign(total)
    return torch.from_numpy(np.asarray(voted if sizes > 0 else 0 * voted, dtype=np.float32))


def expected(workers: list[int], step: int, aggregation: str, dither: bool, dtype: torch.dtype) -> list[Any]:
    """What these workers decide, by parameter, flat; None where none has a gradient."""
    decided: list[Any] = []
    by_rank = {rank: gradients(rank, step, dtype) for rank in workers}
    for index in range(len(SHAPES)):
        own = {rank: None if drawn[index] is None else flat(drawn[index]) for rank, drawn in by_rank.items()}
        voted = decision(own, step, index, aggregation, dither)
        decided.append(None if voted is None else voted.to(dtype))
    return decided


def same(model: Model, decided: list[Any]) -> bool:
    pairs = zip(model.weights, decided, strict=True)
    return all(
        weight.grad is None if own is None else weight.grad is not None and torch.equal(flat(weight.grad), own)
        for weight, own in pairs
    )


def look_late(module: DistributedDataParallel, late: bool) -> None:
    """Whether all votes on a bucket count at first, as on GPUs."""
    _voting[module].asks_first = not late


def vote_in_turns(workers: int, **options: Any) -> tuple[list[Model], VirtualGradients]:
    """The model after each step, with the gradients that virtual workers decided."""
    models = []
    votes = VirtualGradients(Model().named_parameters(), workers, **options)
    for step in range(STEPS):
        model = Model()
        votes.parameters = list(model.parameters())
        for rank in range(workers):
            model(gradients(rank, step)).backward()
            votes.take_turn(rank)
        votes.decide()
        models.append(model)
    return models, votes


def vote(rank: int, settings: list[tuple[str, bool, str, torch.dtype, int]]) -> list[tuple[int, int]]:
    """For each setting the bytes sent and the bad gradients; decisions are compared here."""
    workers = list(range(dist.get_world_size()))
    found = []
    for number, (aggregation, dither, exchange, dtype, native_from) in enumerate(settings):
        signed_gradients.NATIVE_FROM = native_from
        model = Model(dtype)
        module = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=0.02)
        votes = vote_gradients(module, aggregation, dither=dither, exchange=exchange)
        assert votes is not None
        assert (votes._passes is not EAGER) == (native_from == 0)
        if number % 3 == 0:
            look_late(module, True)
            votes._voters = None  # type: ignore[assignment,method-assign]  # looks at each bucket, and there is no need
        signed_gradients._MOST_UNHEARD = 0 if number % 2 else 1 << 20
        for step in range(STEPS):
            module(gradients(rank, step, dtype)).backward()
            assert same(model, expected(workers, step, aggregation, dither, dtype)), (
                aggregation,
                dither,
                exchange,
                native_from,
                step,
            )
            model.zero_grad()
        assert votes.step == votes.ledger.steps == STEPS
        shares = votes.vote_shares()
        assert (shares is None) == (len(workers) == 1)
        assert shares is None or 0 < shares.unanimous < 1
        found.append((votes.ledger.sent_bytes, votes.bad_gradients))
    return found


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_gradients_are_what_the_signs_decide(workers: int) -> None:
    exchanges = ["gather", "sharded"] if workers > 1 else ["auto"]
    dtypes = [torch.float32, torch.bfloat16]
    settings = [
        *itertools.product(["avg", "mavo"], [True, False], exchanges, dtypes[:1], [0, NATIVE_FROM]),
        *itertools.product(["avg"], [True], exchanges[:1], dtypes[1:], [0, NATIVE_FROM]),
    ]
    parameters = sum(torch.Size(shape).numel() for shape in SHAPES)
    for counted in run_workers(vote, workers, settings):
        for (_, _, exchange, _, _), (sent, bad) in zip(settings, counted, strict=True):
            assert bad == 0
            bits = 8 * sent / STEPS / parameters
            assert (workers - 1) <= bits < 1.03 * (workers - 1) or exchange != "gather"
    for aggregation in ("avg", "mavo"):
        models, votes = vote_in_turns(workers, aggregation=aggregation)
        for step, model in enumerate(models):
            assert same(model, expected(list(range(workers)), step, aggregation, True, torch.float32))
        assert votes.members[0].ledger.steps == STEPS


def test_a_bucket_without_elements_is_passed_over() -> None:
    empty, held = torch.nn.Parameter(torch.zeros(0, 3)), torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
    votes = VirtualGradients(iter([("empty", empty), ("held", held)]), 2)  # of two dtypes: each a bucket
    for rank in range(2):
        for parameter in (empty, held):
            parameter.grad = torch.ones_like(parameter)
        votes.take_turn(rank)
    votes.decide()
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)
    assert held.grad is not None
    assert held.grad.abs().max() == 1


def steps_of(rank: int, name: str) -> list[torch.Tensor]:
    """Accelerate with accumulation, an optimizer of torch, and clipping: votes are on the sum of two micro-batches."""
    act_as_launched(rank)
    torch.manual_seed(rank)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    vote_gradients(accelerator)
    inner = torch.nn.Linear(5, 3, bias=name != "Muon")  # which takes matrices
    model, optimizer = accelerator.prepare(inner, getattr(torch.optim, name)(inner.parameters(), lr=0.1))
    assert isinstance(accelerator.ddp_handler, VotedGradients)
    [votes] = accelerator.ddp_handler.votes
    for step in range(4):
        inputs = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(10 * step + rank))
        for half in inputs:
            with accelerator.accumulate(model):
                accelerator.backward(model(half).pow(2).mean())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    assert votes.step == 4
    return [parameter.detach() for parameter in inner.parameters()]


@pytest.mark.parametrize("name", ["AdamW", *(["Muon"] if hasattr(torch.optim, "Muon") else [])])
def test_an_accelerate_loop_with_accumulation(name: str) -> None:
    first, second = run_workers(steps_of, 2, name)
    assert all(map(torch.equal, first, second))


def backwards_in_a_step(rank: int, backwards: int) -> list[str]:
    said = what_is_logged("hf_dlion.gradient_buckets")
    inner = torch.nn.Linear(5, 3)
    module, optimizer = DistributedDataParallel(inner), torch.optim.AdamW(inner.parameters())
    vote_gradients(module)
    for _ in range(2):
        for _ in range(backwards):
            module(torch.randn(4, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return said


def test_votes_on_a_decision_are_warned_of() -> None:
    assert run_workers(backwards_in_a_step, 2, 1) == [[], []]
    for said in run_workers(backwards_in_a_step, 2, 2):
        [warning] = said
        assert "no optimizer has stepped" in warning


def bad_gradients(rank: int) -> list[Any]:
    """Of a worker with an infinite gradient in the last parameter: what each rule makes of it."""
    found: list[Any] = []
    cases = (("abstain", [1]), ("raise", [1]), ("abstain", [0, 1, 2]))
    settings = [(False, "gather", 0), (False, "sharded", 0), (True, "gather", 1 << 20), (True, "sharded", 1 << 20)]
    for (late, exchange, most), (rule, bad_ranks) in itertools.product([*settings, (True, "sharded", 0)], cases):
        signed_gradients._MOST_UNHEARD = most
        model = Model()
        module = DistributedDataParallel(model, find_unused_parameters=True, bucket_cap_mb=1e-5)
        votes = vote_gradients(module, on_bad_gradient=rule, exchange=exchange)
        assert votes is not None
        look_late(module, late)
        module(gradients(rank, 0)).backward()  # then DDP has cut its buckets anew
        model.zero_grad()
        votes.vote_shares()
        votes.step = 2
        own = gradients(rank, 2)
        if rank in bad_ranks:
            own[4][5, 6] = float("inf")  # type: ignore[index]
        try:
            module(own).backward()
            found.append([[weight.grad for weight in model.weights], votes.bad_gradients, votes.vote_shares()])
        except FloatingPointError as error:
            found.append(str(error))
    return found


def test_a_bad_gradient() -> None:
    everyone = run_workers(bad_gradients, 3)
    by_all = expected([0, 1, 2], 2, "avg", True, torch.float32)[:4]
    without = expected([0, 2], 2, "avg", True, torch.float32)[4]
    for found in everyone:
        for number, (outcome, raised, all_bad) in enumerate(zip(*[iter(found)] * 3, strict=True)):
            abstained, left_out, shares = outcome
            assert all(map(torch.equal, map(flat, abstained), [*by_all, without]))
            assert left_out == 1
            assert raised.startswith("rank 1: the gradient of weights.4 has a NaN or Inf at step 2")
            assert all_bad.startswith("rank 0: the gradient of weights.4 has a NaN or Inf")
            assert (shares is None) == (number >= 2)  # looking late, of a step with abstentions


def after_a_failure(rank: int) -> list[bool]:
    """Whether votes are kept when a backward has raised between buckets, and when its module has gone."""
    model = Model()
    module: Any = DistributedDataParallel(model, bucket_cap_mb=1e-5)
    votes = vote_gradients(module)
    look_late(module, True)
    module(gradients(rank, 0)).backward()  # then DDP has cut its buckets anew

    def fail(gradient: torch.Tensor) -> None:
        raise ValueError("in backward")

    model.weights[1].register_hook(fail)
    with pytest.raises(ValueError, match="in backward"):
        module(gradients(rank, 2)).backward()
    unheard = _voting[module].unheard
    assert unheard is not None
    kept = weakref.ref(unheard.decided[0].ballot.words)
    alive = [kept() is not None]
    del module, unheard  # DDP takes no other forward
    gc.collect()
    assert votes is not None
    return [*alive, kept() is not None]


def test_a_failed_backward_leaves_nothing_when_its_module_goes() -> None:
    assert run_workers(after_a_failure, 2) == [[True, False]] * 2


def test_after_an_error_workers_take_their_turns_anew() -> None:
    parameter = torch.nn.Parameter(torch.ones(300))
    votes = VirtualGradients(iter([("weight", parameter)]), 2)
    for value in (torch.nan, 1.0):
        for rank in range(2):
            parameter.grad = torch.full_like(parameter, value)
            votes.take_turn(rank)
        if value != value:
            with pytest.raises(FloatingPointError, match="rank 0: the gradient of weight"):
                votes.decide()
    votes.decide()
    assert parameter.grad is not None
    assert parameter.grad.isfinite().all()


def scaled_steps(rank: int) -> tuple[list[float], torch.Tensor]:
    """A gradient scaler, with an overflow on rank 1 in the second step: scale after each step, and the weights."""
    model = Model()
    module = DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    vote_gradients(module, scaler=scaler)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scales = []
    for step in (0, 2):
        own = gradients(rank, step)
        if rank == 1 and step == 2:
            own[0][0] = float("inf")  # type: ignore[index]
        scaler.scale(module(own)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales, model.weights[1].detach()


def test_a_gradient_scaler_skips_and_backs_off_on_all_ranks() -> None:
    decided = expected([0, 1], 0, "avg", True, torch.float32)[1]
    for scales, weight in run_workers(scaled_steps, 2):
        assert scales == [64.0, 32.0]
        assert torch.equal(weight.flatten(), -decided)  # the scale is taken off again


def wrong_uses(rank: int) -> list[str]:
    """What is said of hooks and optimizers that do not go together."""
    act_as_launched(rank)
    said: list[str] = []

    def attempt(use: Any) -> None:
        with pytest.raises((ValueError, RuntimeError)) as caught:
            use()
        said.append(str(caught.value))

    def wrapped() -> DistributedDataParallel:
        return DistributedDataParallel(torch.nn.Linear(5, 2))

    module = wrapped()
    vote_gradients(module)
    attempt(lambda: keep_gradients_local(module))
    optimizer = DistributedLion(module.parameters())
    module(torch.randn(3, 5)).sum().backward()
    attempt(optimizer.step)
    local = wrapped()
    keep_gradients_local(local)
    attempt(lambda: vote_gradients(local))
    hooked = wrapped()
    hooked.register_comm_hook(None, fp16_compress_hook)
    attempt(lambda: vote_gradients(hooked))
    accelerator = Accelerator(cpu=True)
    vote_gradients(accelerator)
    attempt(lambda: keep_gradients_local(accelerator))
    accelerator = Accelerator(cpu=True)
    keep_gradients_local(accelerator)
    attempt(lambda: vote_gradients(accelerator))
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(torch.nn.Linear(5, 2))
    attempt(lambda: vote_gradients(accelerator))
    return said


def test_what_does_not_go_together_is_refused() -> None:
    for said in run_workers(wrong_uses, 2):
        assert said[0].startswith("keep_gradients_local was given a module that has a communication hook already")
        assert said[1].startswith("DistributedLion exchanges votes or codes of gradients itself")
        assert said[2].startswith("vote_gradients was given a module that has a communication hook already")
        assert "fp16_compress_hook" in said[3]
        assert said[4].startswith("keep_gradients_local was called, and the accelerator's DDP handler is a Voted")
        assert said[5].startswith("vote_gradients was called, and the accelerator's DDP handler is a LocalGradients")
        assert "vote_gradients(accelerator) before accelerator.prepare" in said[6]


def test_what_is_no_ddp_is_refused() -> None:
    with pytest.raises(TypeError, match="was given a Linear"):
        vote_gradients(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="aggregation='mean' is not known"):
        vote_gradients(Accelerator(cpu=True), "mean")
    hook = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
    with pytest.raises(ValueError, match="communication hook 'fp16'"):
        vote_gradients(Accelerator(cpu=True, kwargs_handlers=[hook]))
    plugin = GradientAccumulationPlugin(num_steps=2, sync_each_batch=True)
    with pytest.raises(ValueError, match="with sync_each_batch: each micro-batch would be voted on"):
        vote_gradients(Accelerator(cpu=True, gradient_accumulation_plugin=plugin))


def test_one_process_says_that_nobody_votes(caplog: pytest.LogCaptureFixture) -> None:
    accelerator = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(bucket_cap_mb=7)])
    with caplog.at_level(logging.WARNING):
        vote_gradients(accelerator)
    assert "nobody votes" in caplog.text
    assert accelerator.ddp_handler is not None
    assert accelerator.ddp_handler.to_kwargs() == {"bucket_cap_mb": 7}


def test_sharded_replicas_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_dlion.gradient_votes.voting_group", lambda accelerator: object())
    with pytest.raises(ValueError, match="shards replicas by FSDP2"):
        vote_gradients(Accelerator(cpu=True))
