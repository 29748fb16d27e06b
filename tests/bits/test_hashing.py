"""A fingerprint of a tensor, wherever it begins in memory."""

from __future__ import annotations

import pytest
import torch

from hf_dlion.bits import hashing
from hf_dlion.bits.hashing import checksum, fingerprint


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


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32, torch.float64])
def test_a_checksum_is_of_the_whole_whatever_its_pieces_are(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    source = torch.Generator().manual_seed(0)
    tensors = [(50 * torch.rand(size, generator=source)).to(dtype) for size in (0, 1, 15, 16, 17, 33, 48, 50, 1000)]
    expected = 0
    for index, tensor in enumerate(tensors):
        numbers = tensor.view(integers).tolist()
        for stride in (1, 3, 7):
            total = (sum(numbers[::stride]) + (1 << 63)) % (1 << 64) - (1 << 63)  # as int64 wraps
            expected = (expected * 1000003 + (index + 1) * total) % (1 << 62)
    for piece in (1, 2, 7, 16, 1 << 20):
        monkeypatch.setattr(hashing, "_PIECE", piece)
        assert checksum(tensors) == expected, piece
