"""Votes that leave during backward: bit for bit as without, whatever happens between backward and step."""

from __future__ import annotations

import copy
import pickle
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from hf_dlion import DistributedLion, DistributedMuon, hidden_matrices
from hf_dlion.optim import layout, overlap
from hf_dlion.optim.arrivals import Arrivals
from hf_dlion.optim.bad_gradients import first_bad_gradient
from hf_dlion.optim.overlap import EarlyVotes
from hf_dlion.optim.signum import DistributedSignum

from ..harness import run_workers, what_is_logged
from .test_sharded_replicas import TORCH
from .test_sharding import make_mesh

STEPS = 9
DROPPED = -1
"""Among the numbers of buckets that left early: that a step's do not hold."""


class Net(nn.Module):
    """Two blocks, one that only some batches come to, and an embedding tied to the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(3))
        self.norm = nn.LayerNorm(64)

    def forward(self, tokens: Tensor, blocks: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        hidden = self.embedding(tokens)
        for index in blocks:
            hidden = hidden + self.blocks[index](hidden)
        return F.linear(self.norm(hidden), self.embedding.weight)

    def get_output_embeddings(self) -> None:
        return None


def lion(model: nn.Module, **options: Any) -> DistributedLion:
    return DistributedLion(model.parameters(), 1e-2, weight_decay=0.1, **options)


def signum(model: nn.Module, **options: Any) -> DistributedLion:
    return DistributedSignum(model.parameters(), 1e-2, weight_decay=0.1, **options)


def muon(model: nn.Module, **options: Any) -> DistributedLion:
    return DistributedMuon(hidden_matrices(model), 1e-2, weight_decay=0.1, **options)


def muon_and_adamw(model: nn.Module, **options: Any) -> DistributedLion:
    return muon(model, rest="average", **options)


def muon_of_shards(model: nn.Module, **options: Any) -> DistributedLion:
    return DistributedMuon(hidden_matrices(model, others=["embedding.weight"]), 1e-2, weight_decay=0.1, **options)


Make = Callable[..., DistributedLion]
Event = Callable[[int, int, nn.Module, DistributedLion], None]
"""What happens between the backward passes of a step and the step, on a rank."""

Case = tuple[Make, Event, int, dict[str, Any]]
"""A method, an event, the micro-batches of a step, and options of the optimizer."""

Train = Callable[[Make, Event, int, dict[str, Any]], tuple[list[Tensor], Any]]
"""Of a case, parameters and states after some steps, and the optimizer."""


def nothing(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    pass


def clipped(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step == 5 and rank == 1:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def bad(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step in (4, 6) and rank == 0:
        next(model.parameters()).grad[0, 0] = float("nan")  # type: ignore[index]


def clipped_replica(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step == 5 and rank in (2, 3):  # a collective of the shards
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def scaled_shard(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step == 4 and rank == 2:
        next(model.parameters()).grad.mul_(-0.5)  # type: ignore[union-attr]


def bad_shard(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step in (4, 6) and rank == 1:
        list(model.parameters())[1].grad.to_local()[0] = float("nan")  # type: ignore[union-attr]


def infinite(rank: int, step: int, model: Any, optimizer: DistributedLion) -> None:
    if step == 4 and rank == 0:  # as backward leaves it in the next step
        model.hook = model.blocks[2][2].weight.register_hook(lambda gradient: gradient * float("inf"))
    elif step == 5 and rank == 0:
        model.hook.remove()


def infinite_and_normed(rank: int, step: int, model: Any, optimizer: DistributedLion) -> None:
    infinite(rank, step, model, optimizer)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    optimizer.agreement.known_finite.note_norm(gradients, nn.utils.get_total_norm(gradients))


def replaced(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    for parameter in model.parameters():
        if step == 4 and parameter.grad is not None:
            parameter.grad = parameter.grad.clamp(-1e-3, 1e-3)


def skipped(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step == 5 and rank == 0:  # one batch more, whose predecessor counts no longer
        optimizer.zero_grad()
        backward(model, rank, 99)


def loaded(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step == 4:
        state = copy.deepcopy(optimizer.state_dict())
        for one in state["state"].values():
            torch._foreach_mul_(list(one.values()), 0.5)
        optimizer.load_state_dict(state)


def betas(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step == 5:
        for group in optimizer.param_groups:
            group["betas"] = (0.5, 0.9)


def turned(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    if step == 5 and rank == 1:
        next(iter(optimizer.state.values()))["momentum"].neg_()


def frozen(rank: int, step: int, model: Any, optimizer: DistributedLion) -> None:
    if step in (3, 6):
        model.blocks[1].requires_grad_(step == 6)


def resized(rank: int, step: int, model: Any, optimizer: DistributedLion) -> None:
    if step == 4:
        model.blocks[0][0].weight.data = model.blocks[0][0].weight.data.t().contiguous().t()


def taken_out(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    def take(*_: Any) -> None:
        first, *others = optimizer.param_groups
        optimizer.param_groups = others or [first]
        del optimizer.param_groups[0]["params"][0]
        hook.remove()

    if step == 4:  # after it, and before the next backward
        hook = optimizer.register_step_post_hook(take)


def infinite_and_moved_up(rank: int, step: int, model: Any, optimizer: DistributedLion) -> None:
    infinite(rank, step, model, optimizer)
    if step == 5:  # an infinite gradient has the number of one that was finite
        del optimizer.param_groups[0]["params"][:2]


def gathered(rank: int, step: int, model: nn.Module, optimizer: DistributedLion) -> None:
    """A script's own collectives while votes are on their way, later on one rank than on the other."""
    losses = torch.full((4,), float(rank), device=next(model.parameters()).device)
    for _ in range(3):
        if rank == step % 2:
            time.sleep(0.003)
        dist.all_reduce(losses)


EVENTS = [nothing, clipped, bad, infinite, replaced, skipped, loaded, betas, turned, frozen, resized, taken_out]
EVENTS += [infinite_and_moved_up, infinite_and_normed, gathered]


def backward(model: nn.Module, rank: int, seed: int, blocks: tuple[int, ...] = (0, 1, 2)) -> None:
    tokens = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(1000 * rank + seed))
    tokens = tokens.to(next(model.parameters()).device)
    logits = model(tokens[:, :-1], blocks)
    F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()


def train(
    rank: int, make: Make, event: Event, micro_batches: int, options: dict[str, Any], device: str = "cpu"
) -> tuple[list[Tensor], Any]:
    """Parameters and states after some steps, and the optimizer."""
    torch.manual_seed(0)
    model = Net().to(device)
    optimizer = make(model, **options)
    for step in range(STEPS):
        blocks = (0, 1) if (rank, step) == (0, 3) else (0, 1, 2)
        for micro_batch in range(micro_batches + (step == 7)):
            backward(model, rank, 10 * step + micro_batch, blocks)
        event(rank, step, model, optimizer)
        optimizer.step()
        if event is infinite and step == 5:
            assert optimizer.bad_gradients == 1
        optimizer.zero_grad()
    state = [held for group in optimizer.param_groups for p in group["params"] for held in optimizer.state[p].values()]
    return [p.detach().clone() for p in model.parameters()] + state, optimizer


def train_sharded(
    rank: int, mesh: DeviceMesh, make: Make, event: Event, micro_batches: int, options: dict[str, Any]
) -> tuple[list[Tensor], Any]:
    """As :func:`train`, of 2 replicas of 2 shards each."""
    torch.manual_seed(0)
    model = Net()
    for block in model.blocks:
        fully_shard(block, mesh=mesh["dp_shard"])
    fully_shard(model, mesh=mesh["dp_shard"])
    optimizer = make(model, process_group=mesh["dp_replicate"].get_group(), **options)
    for step in range(STEPS):
        for micro_batch in range(micro_batches):
            model.set_requires_gradient_sync(event is nothing or micro_batch == micro_batches - 1)
            backward(model, rank, 10 * step + micro_batch)
        event(rank, step, model, optimizer)
        optimizer.step()
        optimizer.zero_grad()
    state = [optimizer.state[p]["momentum"] for group in optimizer.param_groups for p in group["params"]]
    return [p.to_local().detach().clone() for p in model.parameters()] + state, optimizer  # type: ignore[attr-defined]


def small_buckets() -> list[int]:
    """Buckets of four blocks; a list that gets the number of each bucket that is sent early."""
    layout.MIN_BUCKET_BLOCKS, layout.DIRECT_BLOCKS, layout.SEGMENT_BLOCKS = 4, 2, 2  # matrices in several buckets
    sent: list[int] = []
    send = EarlyVotes._send_early

    def noted(self: EarlyVotes, bucket: layout.Bucket) -> None:
        sent.append(bucket.number)
        send(self, bucket)

    finish = EarlyVotes.finish

    def looked_at(self: EarlyVotes, *inputs: Any) -> Any:
        decisions = finish(self, *inputs)
        if decisions is None:
            sent.append(DROPPED)
        return decisions

    EarlyVotes._send_early = noted  # type: ignore[method-assign]
    EarlyVotes.finish = looked_at  # type: ignore[method-assign]
    return sent


def both_ways(train: Train, cases: list[Case], sent: list[int]) -> list[tuple[str, bool, int]]:
    """Of each case, whether it ends in the same bits with and without overlap, and how many buckets left early.

    Where nothing happens, votes are dropped at most once: in the step with a micro-batch more than the others.
    """
    found = []
    for make, event, micro_batches, options in cases:
        del sent[:]
        ours, _ = train(make, event, micro_batches, options)
        early, dropped = len(sent), sent.count(DROPPED)
        plain, _ = train(make, event, micro_batches, options | {"overlap": False})
        assert len(sent) == early
        same = all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
        assert event is not nothing or dropped <= 1, (make, options, dropped)
        found.append((f"{make.__name__} {event.__name__} {micro_batches} {options}", same, early))
    return found


def whole_replicas(rank: int, cases: list[Case]) -> list[tuple[str, bool, int]]:
    found = both_ways(partial(train, rank), cases, small_buckets())
    _, optimizer = train(rank, lion, nothing, 1, {})
    _, again = train(rank, lion, clipped, 1, {})
    assert again.plan.exchange.statistics.counted == optimizer.plan.exchange.statistics.counted > 0
    assert optimizer._early is not None
    assert copy.deepcopy(optimizer)._early is None
    assert pickle.loads(pickle.dumps(optimizer))._early is None
    return found


def sharded_replicas(rank: int, cases: list[Case]) -> list[tuple[str, bool, int]]:
    sent, mesh = small_buckets(), make_mesh(2, 2)
    layout.MIN_BUCKET_BLOCKS = 2
    return both_ways(partial(train_sharded, rank, mesh), cases, sent)


models_of_fsdp2 = pytest.mark.skipif(
    TORCH < (2, 9), reason="on a CPU torch 2.6 runs no model of FSDP2, and 2.8 sums its gradients"
)

METHODS = [
    (lion, {}),
    (lion, {"aggregation": "avg", "exchange": "sharded"}),
    (signum, {"tie": "alternate", "exchange": "gather"}),
    (muon, {}),
    (muon, {"tie": "zero", "exchange": "sharded"}),
    (muon, {"aggregation": "avg"}),
    (lion, {"norm_gradients": True}),
    (muon, {"norm_gradients": True, "exchange": "sharded"}),
    (muon_and_adamw, {"norm_gradients": True}),
]


@pytest.mark.parametrize(("workers", "micro_batches", "spoiled"), [(2, 2, METHODS[1]), (3, 1, METHODS[4])])
def test_all_methods_and_events_end_in_the_same_bits(
    workers: int, micro_batches: int, spoiled: tuple[Make, dict[str, Any]]
) -> None:
    cases = [(make, nothing, micro_batches, options) for make, options in METHODS]
    cases += [(spoiled[0], event, 1, spoiled[1]) for event in EVENTS]
    cases += [(muon_and_adamw, event, 1, {}) for event in (clipped, bad, infinite, loaded, frozen, gathered)]
    for name, same, early in (
        case for rank in run_workers(whole_replicas, workers, cases, timeout=400) for case in rank
    ):
        assert same, name
        assert early > 10, name


def _looks_early(rank: int, event: Event) -> int:
    """How many gradients are looked at before a step for what is not finite."""
    small_buckets()
    looked = 0

    def count(gradients: Any) -> int:
        nonlocal looked
        looked += sum(gradient is not None for gradient in gradients)
        return first_bad_gradient(gradients)

    overlap.first_bad_gradient = count
    train(rank, lion, event, 1, {})
    return looked


@pytest.mark.parametrize("event", [nothing, infinite_and_normed])
def test_a_step_that_knows_the_norm_needs_no_look_before(event: Event) -> None:
    for looked in run_workers(_looks_early, 2, event):
        assert (looked == 0) == (event is infinite_and_normed)


def _clip_averages(rank: int) -> tuple[bool, int, list[str]]:
    sent, said = small_buckets(), what_is_logged("hf_dlion.optim.overlap")

    def clip(r: int, step: int, model: Any, optimizer: Any) -> None:
        nn.utils.clip_grad_norm_([model.embedding.weight, *model.norm.parameters()], 0.01)

    ours, theirs = (train(rank, muon_and_adamw, clip, 1, {"overlap": overlap})[0] for overlap in (None, False))
    return all(map(torch.equal, ours, theirs)), len(sent), said


def test_what_is_averaged_may_change_after_backward() -> None:
    for same, sent, said in run_workers(_clip_averages, 2):
        assert same
        assert sent > 10
        assert said == []


def _clip_always(rank: int) -> tuple[int, list[str]]:
    sent, said = small_buckets(), what_is_logged("hf_dlion.optim.overlap")
    for _ in range(2):
        train(rank, lion, lambda r, s, model, o: nn.utils.clip_grad_norm_(model.parameters(), 0.1) and None, 1, {})
    return len(sent), said


def test_clipping_at_every_step_is_noticed_before_anything_is_sent() -> None:
    for rank, (sent, said) in enumerate(run_workers(_clip_always, 2)):
        assert sent == 0
        assert [message for message in said if "norm_gradients" in message] == said
        assert len(said) == (2 if rank == 0 else 0)


@models_of_fsdp2
def test_shards_end_in_the_same_bits() -> None:
    cases: list[Any] = [(lion, event, 1, {}) for event in (nothing, scaled_shard, bad_shard, replaced, loaded, betas)]
    cases += [(lion, nothing, 2, {"aggregation": "avg"}), (signum, clipped_replica, 2, {"tie": "alternate"})]
    for name, same, early in (case for rank in run_workers(sharded_replicas, 4, cases, timeout=120) for case in rank):
        assert same, name
        assert early > 10, name


@models_of_fsdp2
def test_what_is_made_whole_from_shards_leaves_after_backward() -> None:
    cases: list[Any] = [(muon_of_shards, nothing, 1, {}), (lion, nothing, 1, {"norm_gradients": True})]
    for rank in run_workers(sharded_replicas, 4, cases):
        assert all(same and not early for _, same, early in rank), rank


def test_fewer_accumulations_are_waited_for_after_some_steps() -> None:
    rare, parameter = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    complete: list[int] = []
    arrivals = Arrivals([rare, parameter], complete.append)
    found = []
    for step, accumulations in enumerate([4, 4, 2, 2, 2, 2, 3, 3, 2]):
        complete.clear()
        for _ in range(accumulations):
            (parameter + (rare if step in (0, 5) else 0)).sum().backward()
        found.append((accumulations, list(complete), arrivals.unchanged([1])))
        arrivals.next_step()
    assert [step[1] for step in found] == [[], [1], [], [], [], [1], [1], [1], []]
    # The third accumulation came late in step 6, whose votes would not hold; the rare one is waited for four times.
    assert [step[2] for step in found] == [True, True, False, False, False, True, False, True, False]
