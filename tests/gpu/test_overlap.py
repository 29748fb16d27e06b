"""Votes that leave during backward on a GPU: bit for bit as without, whatever happens between backward and step."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from hf_dlion.bits import orthogonal
from tests.gpu.device import DEVICE, run
from tests.kernels import use_kernels
from tests.optim import test_overlap as overlap


def both_ways(rank: int, cases: list[overlap.Case]) -> list[tuple[str, bool, int]]:
    use_kernels("launched" if DEVICE == "cuda" else "eager")
    orthogonal._MAX_BATCH_ON_GPU = 0  # a GPU's product of a matrix depends on which are in the batch with it
    torch.use_deterministic_algorithms(True)
    sent = overlap.small_buckets()
    return overlap.both_ways(partial(overlap.train, rank, device=DEVICE), cases, sent)


@pytest.mark.parametrize("workers", [2, 3])
def test_all_methods_and_events_end_in_the_same_bits(workers: int) -> None:
    asked = {"overlap": True}
    cases: list[overlap.Case] = [
        (make, overlap.nothing, 1 + workers % 2, options | asked) for make, options in overlap.METHODS
    ]
    make, options = overlap.METHODS[2 * workers - 3]
    cases += [(make, event, 1, options | asked) for event in overlap.EVENTS]
    found = [case for rank in run(both_ways, workers, cases, timeout=200) for case in rank]
    assert not [name for name, same, _ in found if not same]
    assert not [(name, early) for name, _, early in found if early <= 10]


def test_is_off_unless_it_is_asked_for() -> None:
    for rank in run(both_ways, 2, [(overlap.lion, overlap.nothing, 1, {})]):
        assert all(same and bool(early) == (DEVICE == "cpu") for _, same, early in rank)
