"""A sharded replica is one worker: its shards have one verdict, and what does not fit is said on all ranks at once."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from hf_dlion import DistributedLion, DistributedMuon, hidden_matrices
from hf_dlion.optim import layout
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.methods import METHODS
from tests.harness import run_workers, what_is_logged
from tests.optim.test_sharding import cut, make_mesh, sharded

SHAPES = [(4, 3), (5,), (2,)]
TORCH = tuple(map(int, torch.__version__.split(".")[:2]))


class Tied(nn.Module):
    """An embedding that is the head, too, around layers that may be checkpointed."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 16)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(16, 23), nn.Tanh(), nn.Linear(23, 16)) for _ in range(2)])
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.recompute = recompute

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x))
        found: Tensor = self.head(x)
        return found


def loss(model: nn.Module, rank: int, step: int) -> Tensor:
    tokens = torch.randint(11, (8,), generator=torch.Generator().manual_seed(100 * step + rank))
    return model(tokens).float().square().mean()


def train_for_real(rank: int, name: str, options: dict[str, Any], batches: int) -> None:
    mesh = make_mesh(2, 2)
    model, whole = Tied(name == "recompute"), Tied()
    for layer in model.layers:
        fully_shard(layer, mesh=mesh["dp_shard"], **options)
    fully_shard(model, mesh=mesh["dp_shard"], **options)
    group = mesh["dp_replicate"].get_group()
    optimizer = DistributedMuon(hidden_matrices(model, others=["embedding.weight"]), process_group=group)
    oracle = DistributedMuon(hidden_matrices(whole, others=["embedding.weight"]), process_group=group)
    names = [name for name, _ in whole.named_parameters()]
    for step in range(6):
        for batch in range(batches):
            last = batch == batches - 1
            if name == "without sync":
                model.set_requires_gradient_sync(last)
            loss(model, rank, 10 * step + batch).backward()
        found = [parameter.grad.full_tensor() for parameter in model.parameters()]  # type: ignore[union-attr]
        shards = []
        for shard in range(2):
            whole.zero_grad()
            for batch in range(batches):
                loss(whole, rank // 2 * 2 + shard, 10 * step + batch).backward()
            shards.append([parameter.grad.clone() for parameter in whole.parameters()])  # type: ignore[union-attr]
        for parameter, one, other, ours in zip(whole.parameters(), *shards, found, strict=True):
            mean = (one + other) / 2
            if name == "bfloat16":
                torch.testing.assert_close(ours, mean, rtol=0.05, atol=0.05)
            elif batches == 1:
                assert torch.equal(ours, mean)
            else:
                torch.testing.assert_close(ours, mean)
            parameter.grad = ours
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
        for which, shard, parameter in zip(names, model.parameters(), whole.parameters(), strict=True):
            assert torch.equal(shard.full_tensor(), parameter), f"{which} after step {step}"  # type: ignore[attr-defined]


@pytest.mark.skipif(TORCH < (2, 9), reason="on a CPU torch 2.6 runs no model of FSDP2, and 2.8 sums its gradients")
def test_models_under_fully_shard() -> None:
    variants: list[tuple[str, dict[str, Any], int]] = [
        ("plain", {}, 1),
        ("kept", {"reshard_after_forward": False}, 1),
        ("recompute", {}, 1),
        ("accumulate", {}, 2),
        ("without sync", {}, 2),
        ("bfloat16", {"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}, 1),
        ("offload", {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, 1),
    ]
    run_workers(each_variant, 4, variants)


def each_variant(rank: int, variants: list[tuple[str, dict[str, Any], int]]) -> None:
    for variant in variants:
        try:
            train_for_real(rank, *variant)
        except Exception as error:
            raise AssertionError(f"{variant[0]}: {error}") from error


def give(params: list[Any], rank: int, step: int, mesh: DeviceMesh, bad: float | None = None) -> None:
    """To each replica its gradients; ``bad`` into the last element that this rank holds."""
    replica = rank // mesh["dp_shard"].size()
    generator = torch.Generator().manual_seed(10 * step + replica)
    for parameter in params:
        parameter.grad = cut(torch.randn(parameter.shape, generator=generator), mesh)
    if bad is not None:
        params[0].grad.to_local()[-1, -1] = bad


def start(mesh: DeviceMesh, **options: Any) -> tuple[list[Any], DistributedLion]:
    params = sharded(mesh, SHAPES)
    return params, DistributedLion(params, lr=0.1, process_group=mesh["dp_replicate"].get_group(), **options)


def one_is_bad(rank: int) -> tuple[int, list[str]]:
    mesh, said = make_mesh(3, 2), what_is_logged()
    params, optimizer = start(mesh, aggregation="avg")
    for step in range(4):
        give(params, rank, step, mesh, math.inf if rank == 3 and step == 2 else None)
        before = [
            optimizer.state[parameter]["momentum"].clone() for parameter in params if parameter in optimizer.state
        ]
        optimizer.step()
        after = [optimizer.state[parameter]["momentum"] for parameter in params]
        if step == 2:
            assert all(map(torch.equal, before, after)) == (rank in (2, 3))
    return optimizer.bad_gradients, said


def test_a_bad_gradient_on_one_shard_silences_its_replica() -> None:
    outcomes = run_workers(one_is_bad, 6)
    assert [count for count, _ in outcomes] == [1] * 6
    assert [len(said) for _, said in outcomes] == [0, 0, 1, 1, 0, 0]
    assert "worker 1 abstains" in outcomes[2][1][0]


def overflow(rank: int) -> tuple[float, int]:
    mesh = make_mesh(2, 2)
    params, optimizer = start(mesh)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(1))
    for step in range(3):
        give(params, rank, step, mesh, math.inf if rank == 1 and step == 1 else None)
        if step == 2:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    return scaler.get_scale(), optimizer.bad_gradients


def test_an_overflow_on_one_shard_lowers_the_scale_of_its_replica() -> None:
    assert run_workers(overflow, 4) == [(4.0, 1), (4.0, 1), (8.0, 1), (8.0, 1)]


def only_on_one_shard(rank: int) -> None:
    """A gradient that only one rank of a replica has is one of zeros on the others."""
    mesh = make_mesh(2, 2)
    params, optimizer = start(mesh)
    other, theirs = start(mesh)
    for step in range(3):
        give(params, rank, step, mesh)
        give(other, rank, step, mesh)
        if rank == 1:
            params[0].grad = None
            other[0].grad.to_local().zero_()
        optimizer.step()
        theirs.step()
        assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(params, other, strict=True))
    optimizer.zero_grad()
    copied, copy_of_it = copy.deepcopy((params, optimizer))
    for mine, one in ((params, optimizer), (copied, copy_of_it)):
        give(mine, rank, 3, mesh)
        one.step()
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in zip(params, copied, strict=True))
    assert not any(torch.equal(a.to_local(), b.to_local()) for a, b in zip(params, other, strict=True) if a.numel() > 9)


def test_a_gradient_that_only_some_shards_have_and_a_copy() -> None:
    run_workers(only_on_one_shard, 4)


def message(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, RuntimeError, FloatingPointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def steps(rank: int, mesh: DeviceMesh, params: list[Any], optimizer: Any, bad: float | None = None) -> None:
    for step in range(2):
        give(params, rank, step, mesh, bad)
        optimizer.step()


def wrong_use(rank: int) -> dict[str, str]:
    mesh = make_mesh(2, 2)
    told = {}

    def case(
        name: str, change: Callable[[list[Any], DistributedLion], Any], bad: float | None = None, **o: Any
    ) -> None:
        params, optimizer = start(mesh, **o)
        change(params, optimizer)
        told[name] = message(lambda: steps(rank, mesh, params, optimizer, bad))

    def rate(lr: float) -> Callable[[list[Any], DistributedLion], None]:
        return lambda params, optimizer: optimizer.param_groups[0].update(lr=lr)

    def add(params: list[Any], optimizer: DistributedLion) -> None:
        if rank == 1:
            params[1].to_local().detach().add_(1)

    case("one shard's rate", rate(0.2 if rank == 1 else 0.1))
    case("one rate in all replicas", rate(0.2 if rank % 2 else 0.1))
    case("one tie in all replicas", lambda *_: None, tie="alternate" if rank % 2 else "zero")
    case("replicas", add)
    case("bad", lambda *_: None, math.nan if rank == 2 else None, on_bad_gradient="raise")
    case("all bad", lambda *_: None, math.nan if rank in (0, 3) else None)
    params, optimizer = start(mesh, check_replicas_steps=1)
    give(params, rank, 0, mesh)
    optimizer.step()
    add(params, optimizer)
    told["apart"] = message(lambda: steps(rank, mesh, params, optimizer))
    for name, group in (("default group", None), ("its own replica", mesh["dp_shard"].get_group())):
        optimizer = DistributedLion(params, process_group=group)
        told[name] = message(lambda optimizer=optimizer: steps(rank, mesh, params, optimizer))  # type: ignore[misc]
    mesh = make_mesh(1, 4)
    case("a replica alone", lambda *_: None)
    case("a rate of one alone", rate(0.2 if rank == 2 else 0.1))
    case("a tie of one alone", lambda *_: None, tie="alternate" if rank == 2 else "zero")
    return told


def test_what_does_not_fit_is_said_on_all_ranks() -> None:
    everyone = run_workers(wrong_use, 4)
    for name, parts in {
        "one shard's rate": ["lr of param group 0 is 0.1 on shard 0, 0.2 on shard 1 of replica 0 on rank 0 and 0.1 on"],
        "one rate in all replicas": ["0.1 on shard 0, 0.2 on shard 1 of replica 0 on rank 0 and 0.1 on shard 0, 0.2"],
        "one tie in all replicas": ["tie is zero on shard 0, alternate on shard 1 of replica 0 on rank 0 and zero on"],
        "a replica alone": ["nothing"],
        "a rate of one alone": ["one replica do not", "lr of param group 0 is 0.1 on ranks 0, 1, 3 and 0.2 on rank 2"],
        "a tie of one alone": ["one replica do not", "tie is zero on ranks 0, 1, 3 and alternate on rank 2"],
        "replicas": ["differ between the ranks before the first step", "on shard 1 on rank 0"],
        "bad": ["FloatingPointError: rank 1: the gradient of parameter 0"],
        "all bad": ["FloatingPointError: rank 0: the gradient of parameter 0"],
        "apart": ["no longer the same on all ranks at step 1: the checksum of parameter 1 is"],
        "default group": ["one vote together", 'mesh["dp_replicate"].get_group()'],
        "its own replica": ["hold shards of one replica"],
    }.items():
        for told in everyone:
            assert all(part in told[name] for part in parts), f"{name}: {told[name]}"


def in_other_collectives(rank: int) -> list[str]:
    """What is wrong when ranks of a replica are about to call each other.

    The first shard comes to the hidden matrices later than the second; of another model one shard has changed.
    """
    mesh = make_mesh(2, 2)
    layout.MAX_BUCKET_BLOCKS = layout.MIN_BUCKET_BLOCKS = 24
    layout.SEGMENT_BLOCKS = 16
    told = []
    for name in ("none", "bad", "rate", "apart"):
        params = sharded(mesh, [(1, 30 * 1024), (1, 30 * 1024), (64, 1024)])
        groups = [{"params": params[:2]}, {"params": params[2:], "orthogonal": True}]
        group = mesh["dp_replicate"].get_group()
        on_bad = "raise" if name == "bad" else "abstain"
        optimizer = DistributedMuon(groups, process_group=group, check_replicas_steps=1, on_bad_gradient=on_bad)
        give(params, rank, 0, mesh)
        optimizer.step()
        give(params, rank, 1, mesh, math.nan if name == "bad" and rank == 2 else None)
        if name == "rate" and rank >= 2:
            optimizer.param_groups[0]["lr"] = 0.1
        if name == "apart" and rank == 3:
            params[2].to_local().detach().add_(1)
        told.append(message(optimizer.step))
    told = [f"{len(optimizer.plan.buckets)} buckets", *told]
    params, normed = start(mesh, norm_gradients=True)
    give(params, rank, 0, mesh)
    normed.step()
    give(params, rank, 1, mesh)
    if rank == 1:
        params[1].grad = None
        nn.ParameterList(params[1:2]).bfloat16()
    return [*told, message(normed.step)]


def test_no_shard_waits_for_one_that_raises() -> None:
    everyone = run_workers(in_other_collectives, 4, timeout=60)
    assert [told[0] for told in everyone] == ["6 buckets", "2 buckets"] * 2
    for _, nothing, bad, rate, apart, converted in everyone:
        assert nothing == "nothing"
        assert "FloatingPointError: rank 1: the gradient of parameter 0, shape (1, 30720), has a NaN" in bad
        assert "lr of param group 0 is 0.001 on rank 0 and 0.1 on rank 1" in rate
        assert "the checksum of parameter 2 is" in apart
        assert "a parameter was changed on some ranks only: parameter 1 is float32" in converted


def unsupported(rank: int) -> dict[str, str]:
    mesh = make_mesh(2, 2)
    group = mesh["dp_replicate"].get_group()
    told = {}
    hybrid = nn.Linear(4, 4)
    fully_shard(hybrid, mesh=mesh)
    told["hybrid"] = message(lambda: DistributedLion(hybrid.parameters(), process_group=group))
    columns = nn.Linear(4, 4, bias=False)
    fully_shard(columns, mesh=mesh["dp_shard"], shard_placement_fn=lambda _: Shard(1))
    told["columns"] = message(lambda: DistributedLion(columns.parameters(), process_group=group))
    params = sharded(mesh, SHAPES)
    mixed: Any = [*params, nn.Parameter(torch.ones(3))]
    told["mixed"] = message(DistributedLion(mixed, process_group=group).step)
    for name in ("terngrad", "graddrop", "dgc"):
        told[name] = message(METHODS[name].optimizer(params, process_group=group).step)  # type: ignore[call-arg]
    virtual = VirtualWorkers(sharded(mesh, SHAPES), 2, DistributedLion)
    told["virtual"] = message(virtual.step)
    return told


def test_what_is_not_supported_is_refused() -> None:
    for told in run_workers(unsupported, 4):
        assert 'mesh=mesh["dp_shard"]' in told["hybrid"]
        assert "shard_placement_fn" in told["columns"]
        assert "without ignored_params" in told["mixed"]
        for name in ("terngrad", "graddrop", "dgc"):
            assert "dlion, dsignum, dmuon, glion, gadamw and gmuon" in told[name]
        assert "Do not shard it" in told["virtual"]


def sent(rank: int, shards: int, options: dict[str, Any]) -> tuple[int, int]:
    mesh = make_mesh(2, shards)
    group = mesh["dp_replicate"].get_group()
    shape = [(96, 1024)]
    params, whole = sharded(mesh, shape), [nn.Parameter(torch.zeros(shape[0]))]
    ours = DistributedLion(params, process_group=group, **options)
    theirs = DistributedLion(whole, process_group=group, **options)
    for step in range(2):
        gradient = torch.randn(shape[0], generator=torch.Generator().manual_seed(10 * step + rank // shards))
        params[0].grad, whole[0].grad = cut(gradient, mesh), gradient  # type: ignore[assignment]
        ours.step()
        theirs.step()
        if step == 0:  # which has the handshake
            first = ours.ledger.copy(), theirs.ledger.copy()
    return ours.ledger.since(first[0]).sent_bytes, theirs.ledger.since(first[1]).sent_bytes


@pytest.mark.parametrize("shards", [2, 3])
def test_a_rank_sends_its_share_of_the_words(shards: int) -> None:
    for ours, theirs in run_workers(functools.partial(sent, shards=shards, options={}), 2 * shards):
        header = theirs - 96 * 1024 // 8
        assert ours - header == (theirs - header) / shards
        assert header < 64
