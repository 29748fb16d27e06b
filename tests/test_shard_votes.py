"""vote_gradients with modules that FSDP2 shards, against a plain reference, over real processes, at tolerance zero."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import weakref
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from hf_dlion import DistributedLion, gradient_buckets, gradient_votes, vote_gradients
from hf_dlion.optim import signed_gradients
from tests.harness import run_workers, what_is_logged
from tests.optim.test_sharded_replicas import TORCH
from tests.optim.test_sharding import make_mesh
from tests.test_gradient_votes import decision

pytestmark = pytest.mark.skipif(
    TORCH < (2, 9), reason="on a CPU torch 2.6 runs no model of FSDP2, and 2.8 sums its gradients"
)

SHARDS, STEPS, MICRO_BATCHES = 2, 4, 2
WIDE = MixedPrecisionPolicy()
CAST = MixedPrecisionPolicy(output_dtype=torch.float64)  # the outputs are not those that FSDP2 looks at


class Net(nn.Module):
    """A block that no batch takes, and two of which a batch takes some; the rows of some weights do not divide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 33)
        self.blocks = nn.ModuleList(nn.Linear(33, 33) for _ in range(3))
        self.last = nn.Linear(33, 1, bias=False)
        self.anew = False  # blocks are computed again, in a backward of their own

    def forward(self, x: torch.Tensor, blocks: list[int]) -> torch.Tensor:
        x = self.first(x)
        for block in blocks:
            called = partial(checkpoint, self.blocks[block], use_reentrant=True) if self.anew else self.blocks[block]
            x = torch.tanh(called(x))
        return self.last(x)


def loss(model: nn.Module, rank: int, step: int, micro_batch: int) -> torch.Tensor:
    """In the second step each replica takes a block of its own."""
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(1000 * rank + 10 * step + micro_batch))
    return model(x, [1 + rank // SHARDS % 2] if step == 1 else [1, 2]).square().mean()


def sharded(mesh: DeviceMesh, policy: MixedPrecisionPolicy = WIDE) -> Any:
    model = Net()
    for part in (*model.blocks, model.last):
        fully_shard(part, mesh=mesh["dp_shard"])
    return fully_shard(model, mesh=mesh["dp_shard"], mp_policy=policy)


def backward(model: Any, rank: int, step: int, spoil: bool = False) -> list[torch.Tensor | None]:
    """What is held of the gradients after several micro-batches."""
    for micro_batch in range(MICRO_BATCHES):
        model.set_requires_gradient_sync(micro_batch == MICRO_BATCHES - 1)
        (loss(model, rank, step, micro_batch) * (torch.nan if spoil else 1)).backward()
    return [None if p.grad is None else p.grad.to_local().flatten() for p in model.parameters()]


def follow(rank: int, replicas: int, settings: list[tuple[str, bool, str]]) -> list[tuple[int, int]]:
    """For each setting the bytes sent, and how many buckets began during backward; decisions are compared here."""
    mesh, replica, shard = make_mesh(replicas, SHARDS), rank // SHARDS, rank % SHARDS
    signed_gradients._BUCKET = 2000
    group, found, early = mesh["dp_replicate"].get_group(), [], []
    arrive = gradient_buckets.ShardedBuckets.arrive

    def noting(buckets: Any, index: int, parameter: torch.Tensor) -> None:
        if index == 4:  # of the middle of the model
            early.extend(range(buckets._started))
        arrive(buckets, index, parameter)

    gradient_buckets.ShardedBuckets.arrive = noting  # type: ignore[method-assign]
    for number, (aggregation, dither, exchange) in enumerate(settings):
        signed_gradients.NATIVE_FROM = 0 if number % 4 < 2 else 1 << 62
        policy = CAST if number % 2 else WIDE
        plain, model = sharded(mesh, policy), sharded(mesh, policy)
        with torch.no_grad():
            loss(model, rank, 0, 0)  # after which whole parameters are where shards were
        votes = vote_gradients(model, aggregation, dither=dither, exchange=exchange, process_group=group)
        assert votes is not None
        buckets: Any = gradient_votes._voting[model]
        assert len(buckets._buckets) > 3
        early.clear()
        for step in range(STEPS):
            given = backward(plain, rank, step)
            own = backward(model, rank, step)
            everyone: list[Any] = [None] * replicas
            dist.all_gather_object(everyone, given, group=group)
            for index, held in enumerate(own):
                of_index = {other: theirs[index] for other, theirs in enumerate(everyone)}
                voted = decision(of_index, step, index, aggregation, dither, replicas * shard)
                assert (held is None) == (voted is None), (aggregation, step, index)
                assert held is None or torch.equal(held, voted), (aggregation, dither, exchange, step, index)
            assert own[2] is None
            assert own[4] is not None
            assert (given[4] is None) == (step == 1 and replica % 2 == 1)
            plain.zero_grad()
            model.zero_grad()
        assert votes.step == votes.ledger.steps == STEPS
        assert votes.bad_gradients == 0
        found.append((votes.ledger.sent_bytes, len(early)))
    return found


@pytest.mark.parametrize("replicas", [2, 3])
def test_gradients_are_what_the_signs_decide(replicas: int) -> None:
    settings = list(itertools.product(["avg", "mavo"], [True, False], ["gather", "sharded"]))
    for counted in run_workers(follow, replicas * SHARDS, replicas, settings):
        assert all(sent > 0 and early >= STEPS - 1 for sent, early in counted)


def with_backwards_inside(rank: int) -> bool:
    """Whether layers that are computed anew in a backward of their own, as reentrant checkpoints do, change nothing."""
    mesh, found = make_mesh(2, SHARDS), []
    for anew in (False, True):
        model = sharded(mesh)
        votes = vote_gradients(model, process_group=mesh["dp_replicate"].get_group())
        model.anew = anew
        model.set_requires_gradient_sync(True)
        loss(model, rank, 0, 0).backward()
        assert votes is not None
        assert votes.step == 1
        found.append([None if p.grad is None else p.grad.to_local() for p in model.parameters()])
    return all(one is other or torch.equal(one, other) for one, other in zip(*found, strict=True))  # type: ignore[arg-type]


def test_a_backward_inside_of_another_is_not_voted_on_by_itself() -> None:
    assert run_workers(with_backwards_inside, 4) == [True] * 4


def raised(rank: int) -> list[str]:
    """In the first step the second replica is bad."""
    mesh, said = make_mesh(2, SHARDS), []
    model = sharded(mesh)
    votes = vote_gradients(model, on_bad_gradient="raise", process_group=mesh["dp_replicate"].get_group())
    for bad in (True, False):
        value = loss(model, rank, 0, 0)
        if bad and rank // SHARDS == 1:
            value = value * torch.nan
        try:
            value.backward()
        except FloatingPointError as error:
            said.append(str(error))
        model.zero_grad()
    assert votes is not None
    assert votes.step == 1
    return said


def test_after_an_error_the_next_backward_is_voted_on() -> None:
    for said in run_workers(raised, 4):
        [one] = said
        assert one.startswith("rank 1: the gradient of ")
        assert "has a NaN or Inf at step 0" in one


def test_the_tensors_in_outputs_are_found() -> None:
    found = dataclasses.make_dataclass("Found", ["loss", "states", "cache"])
    one, two, three = torch.ones(3).unbind()
    nested = {"outputs": found(one, (two, [three]), None), "name": "none"}
    assert [id(tensor) for tensor in gradient_buckets._tensors_in(nested)] == [id(one), id(two), id(three)]


def left_behind(rank: int) -> list[bool]:
    """Of parameters of a model that is no longer there, whether they are."""
    mesh = make_mesh(2, SHARDS)
    model = sharded(mesh)
    vote_gradients(model, process_group=mesh["dp_replicate"].get_group())
    loss(model, rank, 0, 0).backward()
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    del model
    gc.collect()
    return [reference() is not None for reference in references]


def test_a_model_that_is_dropped_is_freed() -> None:
    for left in run_workers(left_behind, 4):
        assert not any(left)


def trained(rank: int) -> tuple[list[torch.Tensor], list[float], list[int], list[str]]:
    """AdamW behind votes, with a bad gradient on the second replica in the third step."""
    mesh, said = make_mesh(2, SHARDS), what_is_logged("hf_dlion.optim.signed_gradients")
    model = sharded(mesh)
    votes = vote_gradients(model, process_group=mesh["dp_replicate"].get_group())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(12):
        losses.append(float(loss(model, rank, 0, 0)))
        backward(model, rank, step, spoil=(step, rank // SHARDS) == (2, 1))
        optimizer.step()
        optimizer.zero_grad()
    assert votes is not None
    return [p.full_tensor().detach() for p in model.parameters()], losses, [votes.bad_gradients], said


def test_replicas_stay_the_same_and_a_bad_gradient_has_no_vote() -> None:
    everyone = run_workers(trained, 4)
    for weights, losses, bad, said in everyone:
        assert all(map(torch.equal, weights, everyone[0][0]))
        assert losses[-1] < losses[0]
        assert bad == [1]
        assert len(said) == (said is everyone[2][3]) + (said is everyone[3][3])


def wrong_uses(rank: int) -> list[str]:
    mesh = make_mesh(2, SHARDS)
    group, scaler = mesh["dp_replicate"].get_group(), torch.amp.GradScaler("cpu")
    model, said = sharded(mesh), []

    def attempt(use: Any, kind: type[Exception] = ValueError) -> None:
        with pytest.raises(kind) as caught:
            use()
        said.append(str(caught.value))

    attempt(lambda: vote_gradients(model))
    attempt(lambda: vote_gradients(model, process_group=mesh["dp_shard"].get_group()))
    attempt(lambda: vote_gradients(model, process_group=group, scaler=scaler))
    vote_gradients(model, process_group=group)
    attempt(lambda: vote_gradients(model, process_group=group))
    loss(model, rank, 0, 0).backward()
    attempt(DistributedLion(model.parameters(), process_group=group).step, RuntimeError)
    attempt(lambda: vote_gradients(Net()), TypeError)
    partly = sharded(mesh)
    partly.blocks.requires_grad_(False)
    vote_gradients(partly, process_group=group)
    loss(partly, rank, 0, 0).backward()
    partly.blocks.requires_grad_(True)
    loss(partly, rank, 0, 0).backward()
    attempt(torch.optim.AdamW(partly.parameters()).step, RuntimeError)
    nothing = sharded(mesh).requires_grad_(False)
    attempt(lambda: vote_gradients(nothing, process_group=group))
    both = fully_shard(Net(), mesh=mesh)
    attempt(lambda: vote_gradients(both, process_group=group))
    attempt(lambda: vote_gradients(nn.parallel.DistributedDataParallel(Net()), process_group=group))
    return said


def test_what_does_not_go_together_is_refused() -> None:
    for said in run_workers(wrong_uses, 4):
        assert 'process_group=mesh["dp_replicate"].get_group()' in said[0]
        assert said[1] == said[0]
        assert "Train in bfloat16, which needs no scaler" in said[2]
        assert "Call it once" in said[3]
        assert said[4].startswith("DistributedLion exchanges votes or codes of gradients itself")
        assert said[5].endswith("was given a Net.")
        assert said[6].startswith("blocks.1.weight has a gradient that nobody has voted on")
        assert "a module in which nothing is trained" in said[7]
        assert 'Give fully_shard the shard dimension alone, mesh=mesh["dp_shard"]' in said[8]
        assert "which has its own. Leave it out" in said[9]
