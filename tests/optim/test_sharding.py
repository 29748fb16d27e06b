"""Replicas sharded by FSDP2, over real processes: bit for bit what whole replicas do."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from hf_dlion import DistributedLion, DistributedMuon
from hf_dlion.optim import layout
from hf_dlion.optim.gadamw import GlobalAdamW
from hf_dlion.optim.glion import GlobalLion
from hf_dlion.optim.gmuon import GlobalMuon
from hf_dlion.optim.signum import DistributedSignum
from hf_dlion.optim.workers import WorkersOptimizer
from tests.harness import run_workers

STEPS = 8
LR, DECAY = 1e-2, 0.1
REST = [(7,), (1, 9), (33, 5), (5,)]  # of which some ranks hold nothing
# Worked on in place and staged, in whole replicas and in shards, from odd places on.
LARGE = [(51, 1601), (64, 1025)]
HIDDEN: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((24, 40), (0, 16, 4, 4)),
    ((40, 24), (1, 12, 12)),
    ((6, 3, 5, 5), ()),
    ((4, 16, 24), (0, 4)),
    ((13, 1601), ()),
    ((2, 8), ()),
]
SHAPES = [*REST, *LARGE, *[shape for shape, _ in HIDDEN]]
VOTES = list(itertools.product(("mavo", "avg"), ("zero", "alternate")))


class Parameters(nn.Module):
    """Nothing but parameters."""

    def __init__(self, shapes: list[tuple[int, ...]] | None = None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        shapes = SHAPES if shapes is None else shapes
        self.all = nn.ParameterList([nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes])


def make_mesh(replicas: int, shards: int) -> DeviceMesh:
    return init_device_mesh("cpu", (replicas, shards), mesh_dim_names=("dp_replicate", "dp_shard"))


def sharded(mesh: DeviceMesh, shapes: list[tuple[int, ...]] | None = None) -> list[nn.Parameter]:
    model = Parameters(shapes)
    fully_shard(model, mesh=mesh["dp_shard"])
    return list(model.parameters())


def gradients(replica: int, step: int) -> list[Tensor | None]:
    """Many of their entries are zero; one parameter has none on replica 1, one on all, and one only zeros."""
    generator = torch.Generator().manual_seed(1000 * step + replica)
    drawn: list[Tensor | None] = [
        torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) > 0.3) for shape in SHAPES
    ]
    drawn[3] = torch.zeros(SHAPES[3])
    if replica == 1 and step % 3 == 1:
        drawn[2] = drawn[7] = None
    if step % 5 == 2:
        drawn[0] = drawn[8] = None
    return drawn


def set_gradients(params: list[Any], found: list[Tensor | None], mesh: DeviceMesh | None = None) -> None:
    for parameter, gradient in zip(params, found, strict=True):
        parameter.grad = gradient if gradient is None or mesh is None else cut(gradient, mesh)


def held(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    """What this rank holds of a tensor, written out: rows as torch.chunk deals them."""
    parts = tensor.detach().chunk(mesh["dp_shard"].size())
    rank = mesh["dp_shard"].get_local_rank()
    return parts[rank] if rank < len(parts) else tensor.detach()[:0]


def cut(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    shape, stride = tensor.shape, tensor.stride()
    return DTensor.from_local(held(tensor, mesh), mesh["dp_shard"], [Shard(0)], shape=shape, stride=stride)


def groups_of(method: type[WorkersOptimizer], params: list[nn.Parameter]) -> list[dict[str, Any]]:
    """With a group of its own for some, and hidden matrices if the method has them."""
    plain = len(REST) + len(LARGE)
    groups: list[dict[str, Any]] = [{"params": params[:plain]}]
    if not issubclass(method, (DistributedMuon, GlobalMuon)):
        return [*groups, {"params": params[plain:], "weight_decay": 0.0}]
    for parameter, (_, split) in zip(params[plain:], HIDDEN, strict=True):
        groups.append({"params": [parameter], "orthogonal": True, "split": split})
    return groups


def make(method: type[WorkersOptimizer], params: list[nn.Parameter], mesh: DeviceMesh, **options: Any) -> Any:
    group = mesh["dp_replicate"].get_group()
    return method(
        groups_of(method, params),
        lr=LR,  # type: ignore[call-arg]
        weight_decay=DECAY,
        process_group=group,
        check_replicas_steps=3,
        **options,
    )


def assert_same(shards: list[Any], wholes: list[Any], mesh: DeviceMesh, what: str) -> None:
    for index, (shard, whole) in enumerate(zip(shards, wholes, strict=True)):
        assert torch.equal(shard.to_local(), held(whole, mesh)), f"{what}: parameter {index}"


def follow_whole_replicas(rank: int, replicas: int, shards: int, cases: list[Any], small: bool) -> None:
    mesh = make_mesh(replicas, shards)
    replica = rank // shards
    if small:  # several buckets, that begin and end elsewhere in the shards
        layout.MAX_BUCKET_BLOCKS = layout.MIN_BUCKET_BLOCKS = 12
        layout.SEGMENT_BLOCKS = 4
    for method, options in cases:
        mine, theirs = sharded(mesh), list(Parameters().parameters())
        optimizer, whole = make(method, mine, mesh, **options), make(method, theirs, mesh, **options)
        for step in range(STEPS):
            set_gradients(mine, gradients(replica, step), mesh)
            set_gradients(theirs, gradients(replica, step))
            optimizer.step()
            whole.step()
            assert_same(mine, theirs, mesh, f"{method.__name__} {options} after step {step}")
        shares = [one.vote_shares() for one in (optimizer, whole)]
        if shares[0] is not None:
            assert shares[0].ties == pytest.approx(shares[1].ties, abs=1e-7)
            assert shares[0].unanimous == pytest.approx(shares[1].unanimous, abs=1e-7)


def vote_cases(method: type[WorkersOptimizer]) -> list[Any]:
    return [
        (method, {"aggregation": aggregation, "tie": tie, "exchange": exchange})
        for (aggregation, tie), exchange in zip(VOTES, ["gather", "sharded", "sharded", "gather"], strict=True)
    ]


LION, SIGNUM, MUON = map(vote_cases, (DistributedLion, DistributedSignum, DistributedMuon))
AVERAGED: list[Any] = [(method, options | {"rest": "average"}) for method, options in MUON]
THREE_STEPS: list[Any] = [(DistributedMuon, {"ns_steps": 3})]
MEANS: list[Any] = [(GlobalLion, {}), (GlobalAdamW, {}), (GlobalMuon, {})]


@pytest.mark.parametrize(
    ("replicas", "shards", "cases", "small"),
    [
        (2, 2, [*LION, *SIGNUM[:1], *MEANS], False),
        (2, 3, [*LION[:2], SIGNUM[3], MEANS[2]], True),
        (2, 2, [*MUON, *AVERAGED[:2], *THREE_STEPS], True),
        (2, 3, [*MUON[:3], AVERAGED[3]], False),
        (1, 2, [LION[0], MUON[0], AVERAGED[0], MEANS[2]], False),
    ],
    ids=["2x2", "2x3", "2x2 muon", "2x3 muon", "one replica"],
)
def test_shards_do_what_whole_replicas_do(replicas: int, shards: int, cases: list[Any], small: bool) -> None:
    run_workers(follow_whole_replicas, replicas * shards, replicas, shards, cases, small)
