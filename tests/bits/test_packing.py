from __future__ import annotations

import pytest
import torch

from hf_dlion.bits.packing import LANES, pack_bits, unpack_bits


@pytest.mark.parametrize("blocks", [1, 3])
def test_bit_k_of_word_j_is_row_k_lane_j(blocks: int) -> None:
    bits = torch.rand(blocks, LANES, LANES, generator=torch.Generator().manual_seed(0)) > 0.5
    words = torch.empty(blocks, LANES, dtype=torch.int32)
    pack_bits(bits, words)
    for block in range(blocks):
        for lane in range(LANES):
            value = sum(int(bits[block, row, lane]) << row for row in range(LANES))
            assert int(words[block, lane]) & 0xFFFFFFFF == value


def test_unpacking_inverts_packing_of_a_slice() -> None:
    bits = torch.rand(5, LANES, LANES, generator=torch.Generator().manual_seed(0)) > 0.5
    words = torch.zeros(9, LANES, dtype=torch.int32)
    pack_bits(bits, words[2:7])
    assert torch.equal(unpack_bits(words[2:7]).bool(), bits)
    assert not words[:2].any()
    assert not words[7:].any()
