"""Every method against a plain, dense implementation written from its paper."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hf_dlion.bits.hashing import digest
from hf_dlion.optim import mean_gradient, sparse
from hf_dlion.optim.dgc import DeepGradientCompression
from hf_dlion.optim.terngrad import TernGrad
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.trainer import methods
from hf_dlion.wire.conversation import run
from hf_dlion.wire.sums import sum_ternary
from tests.harness import run_workers
from tests.reference import newton_schulz

AVERAGED = "dmuon_mavo, the rest averaged"
CASES = methods.METHODS | {
    AVERAGED: replace(methods.METHODS["dmuon_mavo"], fixed={"aggregation": "mavo", "rest": "average"})
}
SHAPES = [(7,), (), (300, 70), (0,), (33, 5)]
STEPS = 6
LR, DECAY = 1e-2, 0.1

Gradients = Sequence[Sequence[torch.Tensor]]  # by worker, by parameter
Update = Callable[[int, list[torch.Tensor], Gradients], None]  # of the parameters, in place


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def gradients(rank: int, step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)


def sgd(momentum: float) -> Callable[[list[torch.Tensor], list[torch.Tensor]], None]:
    """Torch's SGD, on given gradients."""
    made: list[torch.optim.SGD] = []

    def update(x: list[torch.Tensor], g: list[torch.Tensor]) -> None:
        if not made:
            made.append(torch.optim.SGD(x, lr=LR, momentum=momentum, weight_decay=DECAY))
        for parameter, gradient in zip(x, g, strict=True):
            parameter.grad = gradient
        made[0].step()

    return update


def signum(aggregation: str) -> Callable[[int], Update]:
    def make(workers: int) -> Update:
        m = [[torch.zeros(shape) for shape in SHAPES] for _ in range(workers)]

        def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
            for j, parameter in enumerate(x):
                for i in range(workers):
                    m[i][j] = 0.9 * m[i][j] + (1 - 0.9) * g[i][j]
                total = sum(torch.sign(m[i][j]) for i in range(workers))
                decision = torch.sign(total) if aggregation == "mavo" else total / workers
                parameter -= LR * (decision + DECAY * parameter)

        return update

    return make


def global_lion(workers: int) -> Update:
    m = [torch.zeros(shape) for shape in SHAPES]

    def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
        for j, parameter in enumerate(x):
            gradient = mean([g[i][j] for i in range(workers)])
            direction = torch.sign(0.9 * m[j] + (1 - 0.9) * gradient)
            m[j] = 0.99 * m[j] + (1 - 0.99) * gradient
            parameter -= LR * (direction + DECAY * parameter)

    return update


def global_adamw(workers: int) -> Update:
    m, v = ([torch.zeros(shape) for shape in SHAPES] for _ in range(2))

    def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
        for j, parameter in enumerate(x):
            gradient = mean([g[i][j] for i in range(workers)])
            m[j] = 0.9 * m[j] + 0.1 * gradient
            v[j] = 0.999 * v[j] + 0.001 * gradient**2
            corrected = m[j] / (1 - 0.9 ** (step + 1)), v[j] / (1 - 0.999 ** (step + 1))
            parameter *= 1 - LR * DECAY
            parameter -= LR * corrected[0] / (corrected[1].sqrt() + 1e-8)

    return update


HIDDEN = {2: (100, 100, 100), 4: (33,)}  # of SHAPES, the rows of each matrix


def orthogonal(u: torch.Tensor, rows: Sequence[int], scaled: bool = False) -> torch.Tensor:
    parts = [newton_schulz(part) for part in u.split(list(rows))]
    return torch.cat([part * (0.2 * max(part.shape) ** 0.5 if scaled else 1.0) for part in parts])


def muon_votes(aggregation: str) -> Callable[[int], Update]:
    def make(workers: int) -> Update:
        m = [[torch.zeros(shape) for shape in SHAPES] for _ in range(workers)]

        def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
            for j, parameter in enumerate(x):
                beta2, total = 0.95 if j in HIDDEN else 0.99, torch.zeros(SHAPES[j])
                for i in range(workers):
                    u = 0.9 * m[i][j] + (1 - 0.9) * g[i][j]
                    m[i][j] = beta2 * m[i][j] + (1 - beta2) * g[i][j]
                    total += torch.sign(orthogonal(u, HIDDEN[j]) if j in HIDDEN else u)
                mavo = aggregation == "mavo"
                level = torch.sign(total) if mavo else total
                rms = level.double().square().mean().sqrt() / (1 if mavo else workers)
                scale = (0.2 / rms).float() if j in HIDDEN else torch.tensor(0.2)
                parameter -= LR * (level / (1 if mavo else workers) * scale + DECAY * parameter)

        return update

    return make


def muon_votes_and_averages(workers: int) -> Update:
    votes, averages = muon_votes("mavo")(workers), global_adamw(workers)

    def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
        rest = [parameter.clone() for parameter in x]
        averages(step, rest, g)
        votes(step, x, g)
        for j, parameter in enumerate(x):
            if j not in HIDDEN:
                parameter.copy_(rest[j])

    return update


def global_muon(workers: int) -> Update:
    rest = global_adamw(workers)
    m = [torch.zeros(shape) for shape in SHAPES]

    def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
        hidden = {j: x[j].clone() for j in HIDDEN}
        rest(step, x, g)
        for j, parameter in hidden.items():
            gradient = mean([g[i][j] for i in range(workers)])
            u = 0.9 * m[j] + (1 - 0.9) * gradient
            m[j] = 0.95 * m[j] + (1 - 0.95) * gradient
            x[j].copy_(parameter - LR * (orthogonal(u, HIDDEN[j], scaled=True) + DECAY * parameter))

    return update


def terngrad(workers: int) -> Update:
    step_by = sgd(0.9)

    def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
        clipped = [
            [
                one.clamp(-2.5 * one.std(correction=0), 2.5 * one.std(correction=0)) if one.numel() > 1 else one
                for one in g[i]
            ]
            for i in range(workers)
        ]
        generators = [torch.Generator().manual_seed(digest((42, i, step))) for i in range(workers)]
        means = []
        for j in range(len(SHAPES)):
            if not clipped[0][j].numel():
                means.append(torch.zeros(SHAPES[j]))
                continue
            s = max(clipped[i][j].abs().max() for i in range(workers))
            drawn = [torch.rand(clipped[i][j].numel(), generator=generators[i]) for i in range(workers)]
            ternary = [
                torch.sign(clipped[i][j]) * (drawn[i].view(SHAPES[j]) * s < clipped[i][j].abs()) for i in range(workers)
            ]
            means.append(sum(ternary) * s / workers)
        step_by(x, means)

    return update


def keep_largest(tensor: torch.Tensor, share: float) -> torch.Tensor:
    """Where the largest entries are, by sorting."""
    count = min(tensor.numel(), max(1, round(share * tensor.numel())))
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[tensor.abs().reshape(-1).argsort(descending=True)[:count]] = True
    return mask.view(tensor.shape)


def graddrop(workers: int) -> Update:
    residual = [[torch.zeros(shape) for shape in SHAPES] for _ in range(workers)]
    step_by = sgd(0.9)

    def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
        means = []
        for j in range(len(SHAPES)):
            sent = []
            for i in range(workers):
                whole = residual[i][j] + g[i][j]
                sent.append(torch.where(keep_largest(whole, 1 - 0.96), whole, 0))
                residual[i][j] = whole - sent[i]
            means.append(mean(sent))
        step_by(x, means)

    return update


def dgc(workers: int) -> Update:
    u, v = ([[torch.zeros(shape) for shape in SHAPES] for _ in range(workers)] for _ in range(2))
    step_by = sgd(0.0)

    def update(step: int, x: list[torch.Tensor], g: Gradients) -> None:
        kept = 0.25 * ((1 - 0.96) / 0.25) ** (step / 4) if step < 4 else 1 - 0.96
        sent = []
        for i in range(workers):
            norm = torch.stack([one.norm() for one in g[i]]).norm()
            factor = min(torch.tensor(1.0), 1.0 / math.sqrt(workers) / norm)
            sent.append([])
            for j in range(len(SHAPES)):
                u[i][j] = 0.9 * u[i][j] + g[i][j] * factor
                v[i][j] = v[i][j] + u[i][j]
                mask = keep_largest(v[i][j], kept)
                sent[i].append(torch.where(mask, v[i][j], 0))
                u[i][j] = torch.where(mask, 0, u[i][j])
                v[i][j] = torch.where(mask, 0, v[i][j])
        step_by(x, [mean([sent[i][j] for i in range(workers)]) for j in range(len(SHAPES))])

    return update


OPTIONS: dict[str, dict[str, Any]] = {
    "terngrad": {"seed": 42},
    "dgc": {"warmup_steps": 4},
    "dmuon_mavo": {"tie": "zero"},  # as of the others; tests of its own have the other
    AVERAGED: {"tie": "zero"},
}
TOLERANCE = {"gadamw": 1e-6, "gmuon": 1e-6, AVERAGED: 1e-6}  # the formula of AdamW leaves the order of factors open
ORACLES: dict[str, Callable[[int], Update]] = {
    "dsignum_mavo": signum("mavo"),
    "dsignum_avg": signum("avg"),
    "dmuon_mavo": muon_votes("mavo"),
    "dmuon_avg": muon_votes("avg"),
    AVERAGED: muon_votes_and_averages,
    "glion": global_lion,
    "gadamw": global_adamw,
    "gmuon": global_muon,
    "terngrad": terngrad,
    "graddrop": graddrop,
    "dgc": dgc,
}


def groups(name: str, params: Sequence[torch.nn.Parameter]) -> Any:
    """The parameters as the method takes them."""
    if not CASES[name].takes_hidden_matrices:
        return list(params)
    hidden = [{"params": [params[j]], "orthogonal": True, "split": (0, *rows)} for j, rows in HIDDEN.items()]
    return [{"params": [p for j, p in enumerate(params) if j not in HIDDEN]}, *hidden]


def one_group(name: str, parameter: torch.nn.Parameter) -> Any:
    """As the method takes a single parameter: a matrix, where it needs one."""
    return [{"params": [parameter], "orthogonal": True}] if CASES[name].takes_hidden_matrices else [parameter]


def optimizer(name: str, params: Sequence[torch.nn.Parameter]) -> Any:
    method = CASES[name]
    return method.optimizer(groups(name, params), lr=LR, weight_decay=DECAY, **method.fixed, **OPTIONS.get(name, {}))


def train(rank: int, names: Sequence[str], interrupted: bool) -> dict[str, tuple[list[list[torch.Tensor]], Any]]:
    """Each method's parameters after each step, and its ledger."""
    found = {}
    for name in names:
        params = parameters()
        chosen = optimizer(name, params)
        history = []
        for step in range(STEPS):
            if interrupted and step == STEPS // 2:
                state = chosen.state_dict()
                chosen = optimizer(name, params)
                chosen.load_state_dict(state)
            for parameter, gradient in zip(params, gradients(rank, step), strict=True):
                parameter.grad = gradient
            chosen.step()
            history.append([parameter.detach().clone() for parameter in params])
        found[name] = (history, chosen.ledger)
    return found


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_methods_are_those_of_their_papers(workers: int) -> None:
    outcomes = run_workers(train, workers, list(ORACLES), False) if workers > 1 else [train(0, list(ORACLES), False)]
    for name, oracle in ORACLES.items():
        update, x = oracle(workers), [parameter.detach() for parameter in parameters()]
        for step in range(STEPS):
            update(step, x, [gradients(rank, step) for rank in range(workers)])
            for rank in range(workers):
                for ours, reference in zip(outcomes[rank][name][0][step], x, strict=True):
                    close = TOLERANCE.get(name, 0.0)
                    torch.testing.assert_close(ours, reference, rtol=close, atol=close, msg=f"{name}, step {step}")
        for rank in range(1, workers):
            for ours, first in zip(outcomes[rank][name][0], outcomes[0][name][0], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, first, strict=True)), name


def test_methods_go_on_from_their_state() -> None:
    whole, parts = (run_workers(train, 2, list(CASES), interrupted)[1] for interrupted in (False, True))
    for name in CASES:
        for one, other in zip(whole[name][0], parts[name][0], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), name


@pytest.mark.parametrize("name", ["glion", "gadamw", "gmuon", "terngrad", "graddrop", "dgc"])
def test_buckets_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained() -> list[torch.nn.Parameter]:
        params = parameters()
        workers = VirtualWorkers(groups(name, params), 3, CASES[name].optimizer, lr=LR, **OPTIONS.get(name, {}))
        for step in range(3):
            for rank in range(3):
                for parameter, gradient in zip(params, gradients(rank, step), strict=True):
                    parameter.grad = gradient
                workers.next_worker()
            workers.step()
        return params

    whole = trained()
    monkeypatch.setattr(mean_gradient, "BUCKET", 2048)
    assert all(map(torch.equal, trained(), whole))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("workers", [1, 3])
def test_a_group_without_parameters_changes_nothing(name: str, workers: int) -> None:
    def trained(empty: bool) -> list[torch.nn.Parameter]:
        params = parameters()
        given = groups(name, params)
        given = given if isinstance(given[0], dict) else [{"params": given}]
        given = [{"params": []}, *given] if empty else given
        options = {"lr": LR, **CASES[name].fixed, **OPTIONS.get(name, {})}
        method = CASES[name].optimizer
        optimizer: Any = VirtualWorkers(given, workers, method, **options) if workers > 1 else method(given, **options)
        for step in range(3):
            for rank in range(workers):
                for parameter, gradient in zip(params, gradients(rank, step), strict=True):
                    parameter.grad = gradient
                if workers > 1:
                    optimizer.next_worker()
            optimizer.step()
        return params

    assert all(map(torch.equal, trained(True), trained(False)))


def test_bits_are_those_of_the_codes() -> None:
    workers, size = 3, sum(math.prod(shape) for shape in SHAPES)
    outcome = run_workers(train, workers, list(CASES), False)[0]
    share = (workers - 1) / workers
    predicted = {
        "dlion_mavo": share * 2,
        "dlion_avg": workers - 1,
        "dsignum_mavo": share * 2,
        "dsignum_avg": workers - 1,
        "dmuon_mavo": share * 2,
        "dmuon_avg": workers - 1,
        AVERAGED: share * (2 * (size - 8) + 64 * 8) / size,
        "glion": share * 64,
        "gmuon": share * 64,
        "gadamw": share * 64,
        "terngrad": share * (2 + 3),  # 2N + 1 = 7 values
        "graddrop": (workers - 1) * 0.04 * 64,
    }
    for name, bits in predicted.items():
        sent = 8 * outcome[name][1].sent_bytes / (STEPS * size)
        # The openings and notes, and blocks: of 21,000 parameters a few per cent, of a model's millions nothing.
        overhead = 8 * (workers - 1) * (STEPS * (16 + 4 * len(SHAPES)) + 32) / (STEPS * size)
        blocks = 2 + 2 * CASES[name].takes_hidden_matrices  # of a group each
        assert bits * 0.99 < sent < bits * 1.05 + overhead + blocks * 1024 * (workers - 1) / size, name


def ternary_sums(rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    from hf_dlion.wire.collectives import ProcessChannel
    from hf_dlion.wire.ledger import Ledger

    values = torch.randint(-1, 2, (size,), generator=torch.Generator().manual_seed(rank), dtype=torch.int8)
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    total = run(sum_ternary(ProcessChannel(None, Ledger()), values, range(dist.get_world_size())))
    return total, torch.stack(everyone).int().sum(0)


@pytest.mark.parametrize(("workers", "size"), [(2, 1), (3, 5000), (4, 1024)])
def test_ternary_sums_are_exact(workers: int, size: int) -> None:
    for ours, expected in run_workers(ternary_sums, workers, size):
        assert torch.equal(ours, expected.int())


def test_terngrad_is_unbiased() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5))
    gradient = torch.tensor([0.0, 0.1, -0.5, 1.0, -1.0])
    chosen = TernGrad([parameter], lr=1.0, momentum=0.0, clip=0.0)
    for _ in range(4000):
        parameter.grad = gradient
        chosen.step()
    torch.testing.assert_close(-parameter.detach() / 4000, gradient, atol=0.03, rtol=0)
    assert parameter[0] == 0
    assert parameter[3] == -4000


def test_dgc_warms_up() -> None:
    chosen = DeepGradientCompression([torch.nn.Parameter(torch.zeros(3))], drop=0.99, warmup_steps=2)
    shares = []
    for step in range(4):
        chosen.param_groups[0]["step"] = step
        shares.append(chosen.kept)
    assert shares == pytest.approx([0.25, 0.05, 0.01, 0.01])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("terngrad", {"clip": -1.0}, "clip=-1.0"),
        ("graddrop", {"drop": 1.0}, "drop=1.0"),
        ("dgc", {"momentum": 1.0}, "momentum=1.0"),
        ("dgc", {"warmup_steps": -1}, "warmup_steps=-1"),
        ("graddrop", {"rule": "adam"}, "rule='adam'.*'adamw'"),
        ("gadamw", {"betas": (0.9, 1.0)}, "betas"),
        ("glion", {"lr": -1.0}, "lr=-1.0"),
        ("dsignum_mavo", {"momentum": 1.0}, "betas"),
    ],
)
def test_options_out_of_range(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CASES[name].optimizer([torch.nn.Parameter(torch.zeros(3))], **options)


@pytest.mark.parametrize("name", ["graddrop", "dgc"])
def test_more_entries_than_indices_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "MOST_ENTRIES", 4)
    parameter = torch.nn.Parameter(torch.ones(5))
    parameter.grad = torch.ones(5)
    with pytest.raises(ValueError, match="5 parameters: entries travel with an index of 32 bits"):
        CASES[name].optimizer([parameter]).step()


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("dlion", "dsignum", "dmuon"))])
def test_normed_gradients(name: str, workers: int) -> None:
    """As gradients that were divided by their root mean square, at every scale, before they were given."""

    def trained(scale: float | None) -> list[torch.nn.Parameter]:
        params = parameters()
        method, options = CASES[name], CASES[name].fixed | {"norm_gradients": scale is not None, "lr": LR}
        chosen = (
            method.optimizer(groups(name, params), **options)
            if workers == 1
            else VirtualWorkers(groups(name, params), workers, method.optimizer, **options)
        )
        for step in range(3):
            for rank in range(workers):
                for index, parameter in enumerate(params):
                    gradient = gradients(rank, step)[index] * (0 if index == 4 and step == 1 else 1)
                    rms = torch.linalg.vector_norm(gradient) / max(gradient.numel(), 1) ** 0.5
                    parameter.grad = gradient * scale if scale else gradient / (rms if rms > 0 else 1)
                if workers > 1:
                    chosen.next_worker()
            chosen.step()
        return params

    given = trained(None)
    for scale in (1.0, 0.25, 64.0):
        assert all(map(torch.equal, trained(scale), given))
