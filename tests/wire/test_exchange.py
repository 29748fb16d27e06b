"""Both exchanges against a count of unpacked votes, over real processes, and the bytes that they send."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_dlion.bits.native import NATIVE_FROM
from hf_dlion.wire import exchange as exchange_module
from hf_dlion.wire.collectives import ProcessChannel
from hf_dlion.wire.conversation import run
from hf_dlion.wire.exchange import Ballot, Decision, Exchange, make_exchange
from hf_dlion.wire.ledger import Ledger
from tests.harness import run_workers

CPU = torch.device("cpu")


def unpack(words: torch.Tensor) -> torch.Tensor:
    return (words.unsqueeze(-1) >> torch.arange(32)) & 1


def votes_of(rank: int, words: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(-(2**31), 2**31, (words,), dtype=torch.int32, generator=generator)


def expected(workers: int, words: int, aggregation: str, tie: str, step: int) -> torch.Tensor:
    total = sum(2 * unpack(votes_of(rank, words)) - 1 for rank in range(workers)).float()
    if aggregation == "avg":
        return total / workers
    decision = torch.sign(total)
    if tie == "alternate":
        alternating = ((torch.arange(words) + step) % 2 * 2 - 1).float().unsqueeze(1).expand_as(total)
        decision = torch.where(total == 0, alternating, decision)
    return decision


def decided(exchange: Exchange, ballot: Ballot) -> tuple[Decision, torch.Tensor]:
    """The decision of all, and the headers that came with it."""
    seen = []

    def everyone(headers: torch.Tensor) -> range:
        seen.append(headers)
        return range(len(headers))

    decision = run(exchange.decide(ballot, everyone))
    assert decision is not None
    return decision, seen[0]


def ballot_of(rank: int, words: int, padding: float = 0.0) -> Ballot:
    return Ballot(votes_of(rank, words), torch.empty(0, dtype=torch.int32), 0, padding)


def decide_everything(rank: int, workers: int) -> None:
    header = torch.tensor([rank, 7 * rank, -1], dtype=torch.int32)
    for native_from, kind, aggregation, tie, words, step in itertools.product(
        (0, NATIVE_FROM), ("gather", "sharded"), ("mavo", "avg"), ("zero", "alternate"), (32, 96, 160), (0, 1)
    ):
        case = f"{native_from} {kind} {aggregation} {tie} {words} {step}"
        exchange_module.NATIVE_FROM = native_from
        exchange = make_exchange(kind, ProcessChannel(None, Ledger()), words, aggregation, tie, CPU)
        decision, headers = decided(exchange, Ballot(votes_of(rank, words), header, step, 0.0))
        level = sum(unpack(plane) << p for p, plane in enumerate(decision.planes)).float()
        found = (2 * level - decision.highest) / decision.highest
        assert torch.equal(found, expected(workers, words, aggregation, tie, step)), case
        assert headers.tolist() == [[other, 7 * other, -1] for other in range(workers)]


@pytest.mark.parametrize("workers", [2, 3, 4, 5])
def test_decisions_equal_an_unpacked_count(workers: int) -> None:
    run_workers(decide_everything, workers, workers)


def sent_words(rank: int, kind: str, aggregation: str, tie: str, words: int) -> tuple[str, float, float]:
    ledger = Ledger()
    exchange = make_exchange(kind, ProcessChannel(None, ledger), words, aggregation, tie, CPU)
    decided(exchange, ballot_of(rank, words))
    return type(exchange).__name__, ledger.sent_bytes / 4 / words, ledger.received_bytes / 4 / words


@pytest.mark.parametrize(
    ("workers", "aggregation", "tie", "sharded", "chosen"),
    [
        (2, "mavo", "zero", 1.5, "GatherExchange"),
        (2, "mavo", "alternate", 1.0, "GatherExchange"),
        (3, "mavo", "zero", 4 / 3, "ShardedExchange"),
        (3, "avg", "zero", 2.0, "GatherExchange"),
        (4, "mavo", "zero", 2.25, "ShardedExchange"),
        (4, "mavo", "alternate", 1.5, "ShardedExchange"),
        (4, "avg", "zero", 3.0, "GatherExchange"),
    ],
)
def test_bits_sent_per_parameter_and_the_choice(
    workers: int, aggregation: str, tie: str, sharded: float, chosen: str
) -> None:
    words = 9600
    for kind, bits in (("sharded", sharded), ("gather", workers - 1)):
        for _, sent, received in run_workers(sent_words, workers, kind, aggregation, tie, words):
            assert sent == received == pytest.approx(bits)
    assert {name for name, *_ in run_workers(sent_words, workers, "auto", aggregation, tie, words)} == {chosen}


def test_auto_gathers_a_buffer_too_small_to_share_out() -> None:
    assert run_workers(sent_words, 5, "auto", "mavo", "zero", 2)[0][0] == "GatherExchange"


def statistics(rank: int, kind: str) -> tuple[int, int, int, float]:
    words = 160
    exchange = make_exchange(kind, ProcessChannel(None, Ledger()), words, "mavo", "zero", CPU)
    decided(exchange, ballot_of(rank, words, padding=0.25))
    seen = exchange.statistics
    return int(seen.ties), int(seen.unanimous), seen.counted, seen.padding


def test_statistics_of_the_parts_add_up() -> None:
    total = sum(unpack(votes_of(rank, 160)) for rank in range(4))
    parts = run_workers(statistics, 4, "sharded")
    assert [sum(column) for column in zip(*parts, strict=True)] == [
        int((total == 2).sum()),
        int(((total == 0) | (total == 4)).sum()),
        160 * 32,
        160 * 32 / 4,
    ]
    assert run_workers(statistics, 4, "gather")[0][:2] == (
        int((total == 2).sum()),
        int(((total == 0) | (total == 4)).sum()),
    )
