from __future__ import annotations

import pytest
import torch

from hf_dlion.bits.counting import count_planes, equals, majority, parity_words, popcount, reaches

WORDS = 40


def votes(voters: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(voters)
    return list(torch.randint(-(2**31), 2**31, (voters, WORDS), dtype=torch.int32, generator=generator))


def unpack(words: torch.Tensor) -> torch.Tensor:
    return (words.unsqueeze(-1) >> torch.arange(32)) & 1


@pytest.mark.parametrize("voters", [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 31, 33])
def test_planes_hold_the_count(voters: int) -> None:
    cast = votes(voters)
    total = sum(unpack(vote) for vote in cast)
    planes = count_planes(cast)
    assert len(planes) == voters.bit_length()
    assert torch.equal(sum(unpack(plane) << p for p, plane in enumerate(planes)), total)
    for value in range(1, voters + 1):
        assert torch.equal(unpack(reaches(planes, value)).bool(), total >= value)
        assert torch.equal(unpack(equals(planes, value)).bool(), total == value)
    ahead, tied = majority(planes, voters)
    assert torch.equal(unpack(ahead).bool(), total > voters / 2)
    if voters % 2:
        assert tied is None
    else:
        assert torch.equal(unpack(tied).bool(), total == voters // 2)


def test_counting_leaves_the_votes_alone() -> None:
    cast = votes(5)
    before = [vote.clone() for vote in cast]
    majority(count_planes(cast), 5)
    assert all(torch.equal(vote, old) for vote, old in zip(cast, before, strict=True))


def test_popcount() -> None:
    words = torch.cat([votes(1)[0], torch.tensor([0, -1, -(2**31), 2**31 - 1], dtype=torch.int32)])
    assert int(popcount(words)) == sum(bin(int(word) & 0xFFFFFFFF).count("1") for word in words)


def test_parity_alternates_over_words_and_steps() -> None:
    even, odd = (parity_words(6, step, torch.device("cpu")) for step in (4, 7))
    assert even.tolist() == [0, -1, 0, -1, 0, -1]
    assert torch.equal(odd, ~even)
