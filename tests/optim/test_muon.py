"""Distributed Muon against the plain reference, over real processes; and what its groups and votes promise."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch

from hf_dlion import DistributedLion, DistributedMuon
from hf_dlion.bits import orthogonal
from hf_dlion.bits.orthogonal import NS_STEPS
from hf_dlion.bits.packing import LANES
from hf_dlion.optim import layout
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.methods import METHODS
from tests.harness import run_workers
from tests.kernels import use_kernels
from tests.optim.test_dlion import flatten, same_on_all_ranks
from tests.reference import ReferenceMuon, newton_schulz, three_steps

SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
HIDDEN_BETAS = (0.9, 0.95)
REST = [(7,), (), (0,), (33, 5)]
HIDDEN: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    ((24, 40), (0, 16, 4, 4)),  # queries, and fewer keys and values
    ((40, 24), (1, 12, 12)),  # inputs first
    ((6, 3, 5, 5), ()),  # a convolution
    ((3, 16, 24), (0, 3)),  # experts
    ((3, 16, 24), (1, 8, 8)),  # experts with two matrices each
    ((13, 1601), ()),  # worked on in place, with a rest that is staged
    ((0, 8), ()),
    ((8, 8), ()),
    ((8, 8), ()),
]
STEPS = 12


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    shapes = REST + [shape for shape, _ in HIDDEN]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def groups_of(params: list[torch.nn.Parameter]) -> list[dict[str, Any]]:
    hidden = [
        {"params": [parameter], "orthogonal": True, "split": split}
        for parameter, (_, split) in zip(params[len(REST) :], HIDDEN, strict=True)
    ]
    return [{"params": params[: len(REST)]}, *hidden]


def gradients(rank: int, step: int, missing: bool = True) -> list[torch.Tensor | None]:
    """Some of them zero; in some steps one missing on rank 1, one on rank 0, and two on all."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    drawn: list[torch.Tensor | None] = [
        torch.randn(p.shape, generator=generator) * (torch.rand(p.shape, generator=generator) > 0.2)
        for p in parameters()
    ]
    if missing and rank == 1 and step % 2:
        drawn[6] = None
    if missing and rank == 0 and step % 3 == 1:
        drawn[4] = None
    if missing and step == 4:
        drawn[0] = drawn[7] = None
    if step < 3:
        drawn[-1] = torch.zeros(8, 8)
    return drawn


def lanes(params: list[torch.nn.Parameter]) -> torch.Tensor:
    """Each element's lane in the words."""
    numbered = enumerate(params)
    members = [[next(numbered) for _ in group["params"]] for group in groups_of(params)]
    found = [torch.zeros(parameter.numel(), dtype=torch.int64) for parameter in params]
    for bucket in layout.make_buckets(members, 1):
        for segment in bucket.segments:
            for span, place in zip(segment.spans, segment.slices, strict=True):
                found[span.parameter][span.start : span.start + span.length] = torch.arange(place.start, place.stop)
    return torch.cat(found) % LANES


def matrix_indices(shape: tuple[int, ...], split: tuple[int, ...]) -> list[torch.Tensor]:
    """The elements of each matrix, written out for each kind of weight."""
    own = torch.arange(torch.Size(shape).numel()).view(shape)
    if len(shape) == 4:
        return [own.reshape(shape[0], -1)]
    if not split:
        return [own]
    parts = own.split(list(split[1:]), split[0])
    return list(parts) if len(shape) == 2 else [part[e] for part in parts for e in range(part.shape[0])]


def reference(params: list[torch.nn.Parameter], workers: int, **options: Any) -> ReferenceMuon:
    ends = list(itertools.accumulate(p.numel() for p in params))
    hidden = [slice(end - p.numel(), end) for p, end in zip(params, ends, strict=True)][len(REST) :]
    cuts = [matrix_indices(shape, split) for shape, split in HIDDEN]
    return ReferenceMuon(
        flatten(params).clone(),
        workers,
        lanes=lanes(params),
        hidden_betas=HIDDEN_BETAS,
        hidden=hidden,
        cuts=cuts,
        **SETTINGS,
        **options,
    )


def flat_or_zeros(drawn: list[torch.Tensor | None]) -> torch.Tensor:
    pairs = zip(drawn, parameters(), strict=True)
    return flatten([torch.zeros_like(p) if g is None else g for g, p in pairs])


def missing_in(drawn: list[torch.Tensor | None]) -> torch.Tensor:
    pairs = zip(drawn, parameters(), strict=True)
    return torch.cat([torch.full((p.numel(),), g is None) for g, p in pairs])


def follow_reference(
    rank: int,
    workers: int,
    cases: list[tuple[str, str, str]],
    kernels: str,
    ns_steps: int = 5,
    bfloat16: bool = False,
) -> None:
    use_kernels(kernels)
    orthogonal.multiplies_bfloat16 = lambda: bfloat16
    three = partial(three_steps, dtype=torch.bfloat16 if bfloat16 else torch.float32)
    for aggregation, tie, exchange in cases:
        case = f"{aggregation} {tie} {exchange}"
        mine = parameters()
        options = {"aggregation": aggregation, "tie": tie}
        optimizer = DistributedMuon(
            groups_of(mine), exchange=exchange, hidden_betas=HIDDEN_BETAS, ns_steps=ns_steps, **SETTINGS, **options
        )
        plain = reference(mine, workers, orthogonalize=three if ns_steps == 3 else newton_schulz, **options)
        for step in range(STEPS):
            everyone = [gradients(other, step) for other in range(workers)]
            for parameter, gradient in zip(mine, everyone[rank], strict=True):
                parameter.grad = gradient
            optimizer.step()
            plain.step([flat_or_zeros(drawn) for drawn in everyone], [missing_in(drawn) for drawn in everyone])
            assert same_on_all_ranks(flatten(mine), workers), f"{case}: ranks differ after step {step}"
            assert torch.equal(flatten(mine), plain.parameters), f"{case}: not the reference after step {step}"
            momenta = flatten([optimizer.state[parameter]["momentum"] for parameter in mine])
            assert torch.equal(momenta, plain.momenta[rank]), f"{case}: momentum after step {step}"


CASES = list(itertools.product(("mavo", "avg"), ("zero", "alternate"), ("gather", "sharded")))


@pytest.mark.parametrize(
    ("workers", "kernels"), [(1, "native"), (2, "eager"), (2, "native"), (3, "eager"), (4, "native"), (5, "native")]
)
def test_equals_the_reference(workers: int, kernels: str) -> None:
    run_workers(follow_reference, workers, workers, CASES, kernels)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_three_steps_equal_the_reference(workers: int, bfloat16: bool) -> None:
    run_workers(follow_reference, workers, workers, CASES[3:6], "eager", 3, bfloat16)


def follow_with_scaler(rank: int, workers: int) -> int:
    """Rank 1 overflows in the third step, all in the fifth."""
    mine = parameters()
    optimizer = DistributedMuon(groups_of(mine), hidden_betas=HIDDEN_BETAS, **SETTINGS)
    plain = reference(mine, workers, aggregation="mavo", tie="alternate")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # of a loss: it starts the scaler
    for step in range(7):
        everyone = [gradients(other, step, missing=False) for other in range(workers)]
        for parameter, gradient in zip(mine, everyone[rank], strict=True):
            parameter.grad = None if gradient is None else gradient * scaler.get_scale()
        if (step, rank) == (2, 1) or step == 4:
            mine[5].grad[0, 0] = torch.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        if step == 4:
            plain.steps += 1
        else:
            plain.step([None if (step, r) == (2, 1) else flat_or_zeros(drawn) for r, drawn in enumerate(everyone)])
        assert torch.equal(flatten(mine), plain.parameters), step
    return optimizer.bad_gradients


def test_with_a_gradient_scaler_who_overflows_abstains() -> None:
    assert run_workers(follow_with_scaler, 3, 3) == [4, 4, 4]


@pytest.mark.parametrize("ns_steps", NS_STEPS)
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48), (1, 30)])
def test_singular_values_come_near_to_one(
    shape: tuple[int, int], bfloat16: bool, ns_steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orthogonal, "multiplies_bfloat16", lambda: bfloat16)
    rank = min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, rank, generator=seeded())).Q for size in shape)
    values = torch.logspace(-1.5, 0, rank)
    for scale in (1e-6, 1.0, 1e6):
        [found] = orthogonal.orthogonalize([scale * left @ values.diag() @ right.T], ns_steps)
        own = torch.einsum("ir,ij,jr->r", left, found.float(), right)
        assert 0.3 < own.min() <= own.max() < 1.7, (own.min(), own.max())
    zero = torch.zeros(shape)
    assert torch.equal(orthogonal.orthogonalize([zero], ns_steps)[0].float(), zero)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def train(method: type[DistributedLion], groups: list[dict[str, Any]], params: Any, **options: Any) -> VirtualWorkers:
    optimizer = VirtualWorkers(groups, 3, method, **SETTINGS, **options)
    for step in range(4):
        for rank in range(3):
            for parameter, gradient in zip(params, gradients(rank, step), strict=True):
                parameter.grad = gradient
            optimizer.next_worker()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize(("aggregation", "tie"), [("mavo", "alternate"), ("mavo", "zero"), ("avg", "zero")])
@pytest.mark.parametrize("exchange", ["gather", "sharded"])
def test_it_sends_what_dlion_sends_to_the_word(aggregation: str, tie: str, exchange: str) -> None:
    options = {"aggregation": aggregation, "tie": tie, "exchange": exchange}
    one, other = parameters(), parameters()
    plain = [{"params": group["params"]} for group in groups_of(other)]
    ours, theirs = (
        train(DistributedMuon, groups_of(one), one, **options),
        train(DistributedLion, plain, other, **options),
    )
    assert ours.ledger == theirs.ledger


@pytest.mark.parametrize(("aggregation", "tie"), [("mavo", "zero"), ("avg", "zero"), ("mavo", "alternate")])
def test_a_matrix_in_several_buckets_is_scaled_as_a_whole(
    aggregation: str, tie: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = parameters(), parameters()
    train(DistributedMuon, groups_of(one), one, aggregation=aggregation, tie=tie, exchange="sharded")
    for name, blocks in (("MAX_BUCKET_BLOCKS", 6), ("MIN_BUCKET_BLOCKS", 6), ("SEGMENT_BLOCKS", 4)):
        monkeypatch.setattr(layout, name, blocks)
    cut = train(DistributedMuon, groups_of(other), other, aggregation=aggregation, tie=tie, exchange="sharded")
    plan: Any = cut.members[0]._plan
    assert len({bucket.number for bucket in plan.buckets}) > 3
    assert all(map(torch.equal, one, other))


@pytest.mark.parametrize("name", ["dmuon_mavo", "gmuon"])
def test_a_convolution_in_channels_last_is_as_any_other(name: str) -> None:
    plain = torch.nn.Parameter(torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(0)))
    last = torch.nn.Parameter(plain.detach().to(memory_format=torch.channels_last))
    for parameter in (plain, last):
        groups = [{"params": [parameter], "orthogonal": True}]
        optimizer: Any = METHODS[name].optimizer(groups, lr=0.1, **METHODS[name].fixed)
        for step in range(3):
            parameter.grad = torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert last.stride() == (36, 1, 12, 4)
    assert torch.equal(plain, last)


def test_a_small_direction_votes_by_its_sign_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "hf_dlion.optim.muon.orthogonalize_into", lambda matrices, outputs, **_: [o.fill_(1e-9) for o in outputs]
    )
    parameter = torch.nn.Parameter(torch.ones(8, 8, dtype=torch.float16))
    optimizer = VirtualWorkers([{"params": [parameter], "orthogonal": True}], 3, DistributedMuon, lr=1.0)
    for rank in range(3):
        parameter.grad = torch.full((8, 8), 1.0 + rank, dtype=torch.float16)
        optimizer.next_worker()
    optimizer.step()
    assert (parameter < 1).all()


def test_layouts_in_memory_do_not_matter() -> None:
    plain = torch.nn.Parameter(torch.randn(48, 40, generator=torch.Generator().manual_seed(0)))
    turned = torch.nn.Parameter(plain.detach().t().contiguous().t())
    for parameter in (plain, turned):
        optimizer = DistributedMuon([{"params": [parameter], "orthogonal": True}], lr=0.1)
        for step in range(3):
            parameter.grad = torch.randn(48, 40, generator=torch.Generator().manual_seed(step))
            optimizer.step()
    assert turned.stride() == (1, 48)
    assert torch.equal(plain, turned)


def test_bfloat16_moves_by_less_than_its_spacing() -> None:
    parameter = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = VirtualWorkers(
        [{"params": [parameter], "orthogonal": True}], 3, DistributedMuon, lr=1e-3, check_replicas_steps=1
    )
    for step in range(50):
        for rank in range(3):
            generator = torch.Generator().manual_seed(10 * step + rank)
            parameter.grad = (1 + torch.randn(64, 64, generator=generator)).bfloat16()
            optimizer.next_worker()
        optimizer.step()
    moved = (1 - parameter.detach().float()).abs().mean()
    assert 0 < moved < 50 * 1e-3 * 0.2


@pytest.mark.parametrize("name", ["dmuon_mavo", "dmuon_avg", "gmuon"])
def test_wrong_groups(name: str) -> None:
    def make(**group: Any) -> None:
        METHODS[name].optimizer([group], **METHODS[name].fixed)  # type: ignore[call-arg]

    with pytest.raises(ValueError, match=r"no param group has orthogonal=True.*hidden_matrices\(model\)"):
        make(params=parameters())
    with pytest.raises(ValueError, match=r"shape \(7,\) in a group with orthogonal=True: only a matrix"):
        make(params=parameters(), orthogonal=True)
    with pytest.raises(ValueError, match=r"split=\(0, 3, 4\) of a parameter of shape \(8, 8\)"):
        make(params=[parameters()[-1]], orthogonal=True, split=(0, 3, 4))
    with pytest.raises(ValueError, match="a convolution is one matrix"):
        make(params=[parameters()[6]], orthogonal=True, split=(0, 3, 3))
    with pytest.raises(ValueError, match="betas"):
        make(params=[parameters()[-1]], orthogonal=True, betas=(0.9, 1.0))


def test_steps_are_five_or_three() -> None:
    with pytest.raises(ValueError, match="ns_steps=4 is not known; it is one of 5, 3"):
        DistributedMuon(groups_of(parameters()), ns_steps=4)
    for ns_steps, said in ((5, {}), (3, {"ns_steps": 3})):
        options = DistributedMuon(groups_of(parameters()), ns_steps=ns_steps).options()
        assert {name: value for name, value in options.items() if name == "ns_steps"} == said
