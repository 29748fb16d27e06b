"""The predicted bits against those that a worker's ledger counts, and against their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hf_dlion.trainer.methods import METHODS
from studies.bits import local_bits, paper_bits, wire_bits
from studies.tables import bits_table
from tests.harness import run_workers
from tests.optim.test_methods import one_group

SIZE, STEPS = 40_960, 2


def traffic(rank: int) -> dict[str, tuple[float, float]]:
    """Bits sent and received per parameter and step, by method."""
    found = {}
    for name, method in METHODS.items():
        parameter = torch.nn.Parameter(torch.zeros(SIZE // 64, 64))
        optimizer: Any = method.optimizer(one_group(name, parameter), lr=1e-3, **method.fixed)
        for step in range(STEPS):
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(10 * rank + step))
            optimizer.step()
        ledger = optimizer.ledger
        found[name] = tuple(8 * count / (SIZE * STEPS) for count in (ledger.sent_bytes, ledger.received_bytes))
    return found


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_predicted_bits_are_those_counted(workers: int) -> None:
    for name, counted in run_workers(traffic, workers)[0].items():
        predicted = sum(wire_bits(name, workers))
        for bits in counted:
            assert predicted <= bits < 1.01 * predicted + 0.03, (name, predicted)


def test_bits_by_their_formulas() -> None:
    assert wire_bits("dlion_mavo", 3) == pytest.approx((2 / 3, 2 / 3))
    assert wire_bits("dlion_mavo", 8) == pytest.approx((7 / 8, 2 * 7 / 8))
    assert wire_bits("dlion_mavo", 8, tie="alternate") == pytest.approx((7 / 8, 7 / 8))
    assert wire_bits("dlion_mavo", 8, exchange="gather") == (7, 0)
    assert wire_bits("dlion_avg", 16) == pytest.approx((15 / 16, 5 * 15 / 16))
    assert wire_bits("terngrad", 16) == pytest.approx((2 * 15 / 16, 6 * 15 / 16))
    assert wire_bits("graddrop", 16) == pytest.approx((15 * 64 * 0.04, 0))
    assert wire_bits("dgc", 4, drop_share=0.99) == pytest.approx((3 * 64 * 0.01, 0))
    assert wire_bits("gadamw", 1) == (0, 0)
    assert paper_bits("dlion_mavo", 4) == (1, 1)
    assert paper_bits("dsignum_avg", 7) == (1, 3)
    assert paper_bits("terngrad", 4) == pytest.approx((1.5, math.log2(9)))
    assert paper_bits("dgc", 4) == pytest.approx((1.28, 32))
    assert paper_bits("glion", 4) == (32, 32)


def test_local_steps_by_their_formula() -> None:
    """What they count is tested with them, `tests/optim/test_local_steps.py`."""
    assert sum(local_bits("mavo", 4, 16)) == pytest.approx((1.5 + 0.1875) / 16)
    assert sum(local_bits("mavo", 4, 1, tie="zero")) == pytest.approx(2.25 + 0.1875)
    assert sum(local_bits("avg", 3, 16)) == pytest.approx((2 + 1 / 6) / 16)
    assert sum(local_bits("mean", 4, 64)) == pytest.approx(48 / 64)


@pytest.mark.parametrize(("aggregation", "predicted"), [("avg", 3.0), ("mavo", 2.25)])
def test_votes_on_gradients_have_their_row(aggregation: str, predicted: float) -> None:
    settings = {"optim": "adamw_torch", "gradient_votes": aggregation}
    run = {"method": "x", "workers": 4, "settings": settings, "bits_sent": 3.3, "bits_received": 3.3}
    table = bits_table([run])
    assert table is not None
    assert f"= {predicted:.3f} | 3.300 | 3.300 | {3.3 / predicted:.3f} |" in table


def test_nothing_is_predicted_where_it_depends_on_the_model() -> None:
    settings = {"optim": "dmuon_mavo", "muon_rest": "average"}
    table = bits_table([{"method": "x", "workers": 4, "settings": settings, "bits_sent": 7.5, "bits_received": 7.5}])
    assert table is not None
    assert table.endswith("| `x` | 4 | - | - | 7.500 | 7.500 | - |")
