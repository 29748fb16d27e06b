"""Votes on a GPU: against the plain reference on the CPU, and processes against virtual workers, bit for bit.

All kernels multiply and add in two roundings, as on the CPU. Eager ones divide by 1, 2, 3 and 4 exactly as there, and
by others perhaps in another last place; Triton's always as there.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dlion import DistributedLion, DistributedMuon, LocalSteps, load_workers, save_workers
from hf_dlion.bits.orthogonal import NS_STEPS, orthogonalize
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer.methods import METHODS
from tests.gpu.device import DEVICE, parameters_there, run, set_gradients
from tests.kernels import use_kernels
from tests.optim import test_dlion as dense
from tests.optim import test_muon as directed
from tests.optim.test_abstention import BAD, spoil
from tests.optim.test_methods import OPTIONS, groups
from tests.optim.test_methods import parameters as small_parameters
from tests.optim.test_virtual import options, received
from tests.reference import ReferenceLion, newton_schulz, three_steps

STEPS = 8
ON_GPUS = ("eager", "launched") if DEVICE == "cuda" else ("eager",)
CASES = list(itertools.product(("mavo", "avg"), ("zero", "alternate"), ("gather", "sharded"), dense.DTYPES))


def same_everywhere(tensor: torch.Tensor, workers: int) -> bool:
    return dense.same_on_all_ranks(tensor.cpu(), workers)


def follow_reference(rank: int, workers: int, kernels: str, cases: list[Any]) -> None:
    use_kernels(kernels)
    for aggregation, tie, exchange, dtype in cases:
        case = (aggregation, tie, exchange, dtype)
        mine = parameters_there(dense.parameters(dtype))
        optimizer = DistributedLion(mine, aggregation=aggregation, tie=tie, exchange=exchange, **dense.SETTINGS)
        start = dense.flatten(dense.parameters(dtype)).clone()
        votes = {"aggregation": aggregation, "tie": tie}
        reference = ReferenceLion(start, workers, **dense.SETTINGS, **votes, lanes=dense.lanes())
        if dtype == torch.bfloat16:
            reference.rounding = dense.rounding(workers)
        for step in range(STEPS):
            bad = BAD.get(step, []) if workers == 3 else []
            own = dense.gradients(rank, step, dtype)
            set_gradients(mine, spoil(own, torch.nan) if rank in bad else own)
            optimizer.step()
            drawn = [dense.flatten(dense.gradients(other, step, dtype)) for other in range(workers)]
            reference.step([None if other in bad else drawn[other] for other in range(workers)])
            ours = dense.flatten(mine).cpu()
            assert same_everywhere(ours, workers), (case, step, "ranks differ")
            assert torch.equal(ours, reference.parameters), (case, step)
            momenta = dense.flatten([optimizer.state[parameter]["momentum"] for parameter in mine]).cpu()
            assert torch.equal(momenta, reference.momenta[rank]), (case, step, "momentum")


@pytest.mark.parametrize("kernels", ON_GPUS)
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_equals_the_reference_on_the_cpu(workers: int, kernels: str) -> None:
    """With three, some abstain."""
    run(follow_reference, workers, workers, kernels, CASES, timeout=200)


def follow_directions(rank: int, workers: int) -> float:
    """The share of parameters that are next to those of the reference."""
    use_kernels(ON_GPUS[-1])
    shares = []
    for aggregation, tie, exchange in [("mavo", "alternate", "gather"), ("avg", "zero", "sharded")]:
        mine = parameters_there(directed.parameters())
        votes = {"aggregation": aggregation, "tie": tie}
        betas = {"hidden_betas": directed.HIDDEN_BETAS}
        optimizer = DistributedMuon(directed.groups_of(mine), exchange=exchange, **betas, **directed.SETTINGS, **votes)
        plain = directed.reference(directed.parameters(), workers, **votes)
        for step in range(4):
            set_gradients(mine, directed.gradients(rank, step, missing=False))
            optimizer.step()
            drawn = [directed.gradients(other, step, missing=False) for other in range(workers)]
            plain.step([directed.flat_or_zeros(own) for own in drawn])
            ours = dense.flatten(mine).cpu()
            assert same_everywhere(ours, workers), (aggregation, step, "ranks differ")
            momenta = dense.flatten([optimizer.state[parameter]["momentum"] for parameter in mine]).cpu()
            assert torch.equal(momenta, plain.momenta[rank]), (aggregation, step, "momentum")
        shares.append(float(((ours - plain.parameters).abs() < 1e-3).float().mean()))
    return min(shares)


def test_muon_keeps_replicas_equal_and_momenta_exact(record_property: Any) -> None:
    shares = run(follow_directions, 2, 2)
    record_property("muon_share_of_parameters_next_to_the_reference", shares[0])
    assert shares[0] > 0.9


@pytest.mark.parametrize("ns_steps", NS_STEPS)
@pytest.mark.parametrize("shape", [(256, 512), (512, 256), (64, 64)])
def test_directions_have_the_signs_of_float32(shape: tuple[int, int], ns_steps: int, record_property: Any) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    [ours] = orthogonalize([matrix.to(DEVICE)], ns_steps).float().cpu()
    theirs = newton_schulz(matrix) if ns_steps == 5 else three_steps(matrix, torch.float32)
    alike = float((ours.sign() == theirs.sign()).float().mean())
    record_property("signs_alike", alike)
    assert alike > (0.985 if ns_steps == 5 else 0.96)  # bfloat16 on a GPU: those next to zero
    assert (ours - theirs).abs().max() < 0.05


def train(params: list[torch.nn.Parameter], optimizer: Any, workers: int, rank: int | None = None) -> torch.Tensor:
    """Four steps, as one of several processes or in turns: gradients are missing, and zero, in some."""
    for step in range(4):
        for worker in range(workers) if rank is None else [rank]:
            set_gradients(params, received(worker, step))
            if rank is None:
                optimizer.next_worker()
        optimizer.step()
    return dense.flatten(params).cpu()


def all_methods(rank: int, workers: int) -> dict[str, torch.Tensor]:
    found = {}
    for name in METHODS:
        params = parameters_there(small_parameters())
        optimizer = METHODS[name].optimizer(groups(name, params), **options(name, OPTIONS.get(name, {})))
        found[name] = train(params, optimizer, workers, rank)
    return found


@pytest.mark.parametrize("workers", [2, 3])
def test_virtual_workers_are_processes_with_every_method(workers: int) -> None:
    everyone = run(all_methods, workers, workers)
    for name in METHODS:
        assert all(torch.equal(everyone[0][name], other[name]) for other in everyone), name
        params = parameters_there(small_parameters())
        own = options(name, OPTIONS.get(name, {}))
        optimizer = VirtualWorkers(groups(name, params), workers, METHODS[name].optimizer, **own)
        assert torch.equal(train(params, optimizer, workers), everyone[0][name]), name


LOCAL: list[dict[str, Any]] = [
    {"every": 2},
    {"every": 2, "aggregation": "mean"},
    {"every": 4, "fragments": 2, "delay": 1, "aggregation": "avg"},
]


def local_steps(params: Any, process_group: Any = None, **outer: Any) -> LocalSteps:
    inner = torch.optim.AdamW(params, lr=1e-2, fused=DEVICE == "cuda")
    return LocalSteps(inner, process_group=process_group, **outer)


def all_rounds(rank: int, workers: int) -> list[torch.Tensor]:
    found = []
    for outer in LOCAL:
        params = parameters_there(small_parameters())
        optimizer = local_steps(params, **outer)
        train(params, optimizer, workers, rank)
        optimizer.vote()
        found.append(dense.flatten(params).cpu())
    return found


def test_local_steps_in_turns_and_in_processes() -> None:
    first, second = run(all_rounds, 2, 2)
    for outer, one, other in zip(LOCAL, first, second, strict=True):
        assert torch.equal(one, other), outer
        params = parameters_there(small_parameters())
        optimizer = VirtualWorkers(params, 2, local_steps, **outer)
        train(params, optimizer, 2)
        optimizer.vote()
        assert torch.equal(dense.flatten(params).cpu(), one), outer


def interrupted(rank: int, folder: str) -> None:
    """Saved at half the way; resumed there, and on the CPU."""

    def make(params: list[torch.nn.Parameter]) -> DistributedLion:
        return DistributedLion(params, aggregation="avg", **dense.SETTINGS)

    params = parameters_there(small_parameters())
    optimizer = make(params)
    train(params, optimizer, 2, rank)
    before = [parameter.detach().clone() for parameter in params]
    save_workers(folder, optimizer)
    whole = train(params, optimizer, 2, rank)
    resumed = parameters_there(before)
    again = make(resumed)
    load_workers(folder, again)
    momenta = [again.state[parameter]["momentum"] for parameter in resumed]
    assert {momentum.device.type for momentum in momenta} == {DEVICE}
    elsewhere = [torch.nn.Parameter(parameter.cpu()) for parameter in before]
    on_cpu = make(elsewhere)
    load_workers(folder, on_cpu)
    for parameter, momentum in zip(elsewhere, momenta, strict=True):
        assert torch.equal(on_cpu.state[parameter]["momentum"], momentum.cpu())
    from_there = make(parameters_there(before))
    from_there.load_state_dict(on_cpu.state_dict())
    assert {tensor.device.type for state in from_there.state.values() for tensor in state.values()} == {DEVICE}
    assert torch.equal(train(resumed, again, 2, rank), whole)


def test_a_checkpoint_resumes_exactly_and_moves_between_devices(tmp_path: Path) -> None:
    run(interrupted, 2, str(tmp_path))


def test_a_scaler_sees_an_overflow_and_the_step_changes_nothing() -> None:
    params = parameters_there(dense.parameters(torch.float32))
    optimizer = DistributedLion(params, **dense.SETTINGS)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=DEVICE))  # of a loss: it starts the scaler
    history = [dense.flatten(params).clone()]
    for step in range(3):
        own = [gradient * scaler.get_scale() for gradient in dense.gradients(0, step, torch.float32)]
        set_gradients(params, spoil(own, torch.inf) if step == 1 else own)
        scaler.step(optimizer)
        scaler.update()
        history.append(dense.flatten(params).clone())
    assert scaler.get_scale() == 512
    assert [torch.equal(before, after) for before, after in itertools.pairwise(history)] == [False, True, False]


def test_workers_go_on_with_the_stream_of_their_caller() -> None:
    if DEVICE == "cpu":
        pytest.skip("a CPU has no streams")
    side, seen = torch.cuda.Stream(), []
    params = parameters_there(small_parameters())
    optimizer = VirtualWorkers(params, 2, DistributedLion)
    for member in optimizer.members:
        member.register_step_pre_hook(lambda *_: seen.append(torch.cuda.current_stream()))
    with torch.cuda.stream(side):
        train(params, optimizer, 2)
    assert set(seen) == {side}


def as_by_eager_kernels(rank: int, method: str) -> None:
    from tests.optim import launched

    launched.check_mixed(method, DEVICE)
    launched.check_first_bad(DEVICE)
    launched.check_norms(DEVICE)
    launched.check_counts(DEVICE)
    launched.check_dither(DEVICE)


@pytest.mark.skipif(
    DEVICE == "cpu", reason="Triton's kernels are for GPUs; in its interpreter, test_launches.py runs them"
)
@pytest.mark.parametrize("method", ["dlion", "dmuon"])
def test_tensors_of_all_kinds_are_as_by_eager_kernels(method: str) -> None:
    """Aligned or not, dense or not, in several dtypes."""
    run(as_by_eager_kernels, 1, method)
