"""A fingerprint of a tensor, wherever it begins in memory."""

from __future__ import annotations

import pytest
import torch

from hf_dlion.bits.hashing import fingerprint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_tensor_that_was_changed_in_place_has_another_fingerprint(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(1003).to(dtype)
    for start in range(5):
        for length in (0, 1, 2, 3, 5, 17, 900):
            one = values[start : start + length]
            found = fingerprint(one)
            assert fingerprint(one) == found
            for changed in (one * 0.5, -one, one.clamp(-0.01, 0.01)):
                assert (fingerprint(changed) == found) == (length == 0), (start, length)


def test_of_what_has_gaps() -> None:
    assert fingerprint(torch.arange(10.0)[::2]) == fingerprint(torch.arange(0.0, 10.0, 2))
    assert fingerprint(torch.ones(1).expand(7)) == fingerprint(torch.ones(7))
