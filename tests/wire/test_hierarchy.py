"""Votes that are counted inside a node first, against a count of unpacked votes, and the bytes between nodes."""

from __future__ import annotations

import itertools
import os

import pytest
import torch

from hf_dlion import DistributedLion
from hf_dlion.bits.counting import add_counts, count_planes
from hf_dlion.optim.virtual import VirtualWorkers
from hf_dlion.wire.collectives import ProcessChannel
from hf_dlion.wire.conversation import run
from hf_dlion.wire.exchange import Ballot, HierarchicalExchange, make_exchange
from hf_dlion.wire.ledger import Ledger
from tests.harness import run_workers
from tests.optim.test_sharding import cut, make_mesh, sharded
from tests.wire.test_exchange import CPU, decided, expected, unpack, votes_of

WORDS = 160


def live_on_nodes(rank: int, local: int) -> None:
    os.environ.update(LOCAL_WORLD_SIZE=str(local), LOCAL_RANK=str(rank % local))


def exchange_of(kind: str, aggregation: str = "mavo", tie: str = "zero", words: int = WORDS) -> HierarchicalExchange:
    exchange = make_exchange(kind, ProcessChannel(None, Ledger()), words, aggregation, tie, CPU)
    assert isinstance(exchange, HierarchicalExchange)
    return exchange


def decide_everything(rank: int, nodes: int, local: int) -> None:
    live_on_nodes(rank, local)
    workers = nodes * local
    header = torch.tensor([rank, 7 * rank, -1], dtype=torch.int32)
    for aggregation, tie in itertools.product(("mavo", "avg"), ("zero", "alternate")):
        exchange = exchange_of("hierarchical", aggregation, tie)
        for words, step in itertools.product((32, 96, WORDS), (0, 1)):
            case = f"{aggregation} {tie} {words} {step}"
            found, headers = decided(exchange, Ballot(votes_of(rank, words), header, step, 0.0))
            level = sum(unpack(plane) << p for p, plane in enumerate(found.planes)).float()
            wanted = expected(workers, words, aggregation, tie, step)
            assert torch.equal((2 * level - found.highest) / found.highest, wanted), case
            assert headers.tolist() == [[other, 7 * other, -1] for other in range(workers)], case
        ballot = Ballot(votes_of(rank, WORDS), header[:0], 0, 0.0)
        for voters in ([0], list(range(local)), [0, workers - 1], list(range(1, workers))):
            one = run(exchange.decide(ballot, lambda _, voters=voters: voters))  # type: ignore[misc]
            flat = make_exchange("gather", ProcessChannel(None, Ledger()), WORDS, aggregation, tie, CPU)
            other = run(flat.decide(ballot, lambda _, voters=voters: voters))  # type: ignore[misc]
            assert one is not None
            assert other is not None
            assert one.highest == other.highest
            assert all(map(torch.equal, one.planes, other.planes)), f"{aggregation} {tie} {voters}"
        assert run(exchange.decide(ballot, lambda _: [])) is None


@pytest.mark.parametrize(("nodes", "local"), [(2, 2), (2, 3)])
def test_decisions_equal_an_unpacked_count(nodes: int, local: int) -> None:
    run_workers(decide_everything, nodes * local, nodes, local)


def bytes_sent(rank: int, nodes: int, local: int) -> tuple[int, int, int, int]:
    live_on_nodes(rank, local)
    exchange = exchange_of("auto", words=96 * local)
    between = exchange.nodes.across.ledger = Ledger()
    ballot = Ballot(votes_of(rank, 96 * local), torch.empty(0, dtype=torch.int32), 0, 0.0)
    decided(exchange, ballot)
    seen = exchange.statistics
    return between.sent_bytes, exchange.channel.ledger.sent_bytes, int(seen.unanimous), seen.counted


@pytest.mark.parametrize(("nodes", "local"), [(2, 2), (2, 3)])
def test_between_nodes_goes_what_one_rank_of_each_would_send(nodes: int, local: int) -> None:
    outcomes = run_workers(bytes_sent, nodes * local, nodes, local)
    words = 96 * local
    for between, inside, _, _ in outcomes:
        assert between == (nodes - 1) * 4 * 96 * 2  # counts up to 3: two planes
        planes = 2 if nodes * local % 2 == 0 else 1
        assert inside == (local - 1) * 4 * 96 * (1 + planes)
    # By gather, one rank sends all of its words to each rank of the other nodes.
    assert sum(between for between, *_ in outcomes[:local]) <= (nodes - 1) * local * 4 * words
    level = sum(unpack(votes_of(rank, words)) for rank in range(nodes * local))
    assert sum(unanimous for *_, unanimous, _ in outcomes) == int(((level == 0) | (level == nodes * local)).sum())
    assert sum(counted for *_, counted in outcomes) == 32 * words


def train(rank: int, exchange: str) -> torch.Tensor:
    live_on_nodes(rank, 2)
    parameter = torch.nn.Parameter(torch.ones(5000))
    optimizer = DistributedLion([parameter], lr=0.1, exchange=exchange, aggregation="avg", check_replicas_steps=2)
    for step in range(4):
        parameter.grad = torch.randn(5000, generator=torch.Generator().manual_seed(10 * step + rank))
        if rank == 3 and step == 1:
            parameter.grad[0] = torch.nan
        optimizer.step()
    assert optimizer.bad_gradients == 1
    return parameter.detach()


def test_an_optimizer_ends_where_it_does_with_the_others() -> None:
    everyone = run_workers(train, 4, "hierarchical") + run_workers(train, 4, "sharded")
    assert all(torch.equal(one, everyone[0]) for one in everyone)


def not_on_nodes(rank: int, local: int) -> str:
    live_on_nodes(rank, local)
    for kind in ("auto", "sharded"):
        assert not isinstance(
            make_exchange(kind, ProcessChannel(None, Ledger()), 96, "mavo", "zero", CPU), HierarchicalExchange
        )
    with pytest.raises(ValueError, match="not on several nodes") as caught:
        exchange_of("hierarchical")
    return str(caught.value)


@pytest.mark.parametrize("local", [1, 4, 3])
def test_without_nodes_votes_are_not_counted_by_node(local: int) -> None:
    run_workers(not_on_nodes, 4, local)


def several_replicas_a_node(rank: int) -> list[bool]:
    """Four replicas of two shards, on nodes of two replicas, and of one."""
    mesh = make_mesh(4, 2)
    found = []
    for processes in (4, 2):
        live_on_nodes(rank, processes)
        params = sharded(mesh, [(96, 1024)])
        optimizer = DistributedLion(params, process_group=mesh["dp_replicate"].get_group(), check_replicas_steps=1)
        for step in range(2):
            gradient = torch.randn(96, 1024, generator=torch.Generator().manual_seed(10 * step + rank // 2))
            params[0].grad = cut(gradient, mesh)  # type: ignore[assignment]
            optimizer.step()
        assert optimizer.plan is not None
        found.append(isinstance(optimizer.plan.exchange, HierarchicalExchange))
    return found


def test_sharded_replicas_of_one_node_are_counted_there() -> None:
    assert run_workers(several_replicas_a_node, 8) == [[True, False]] * 8


def test_virtual_workers_have_no_nodes() -> None:
    optimizer = VirtualWorkers([torch.nn.Parameter(torch.ones(3))], 4, DistributedLion, exchange="hierarchical")
    with pytest.raises(ValueError, match="not on several nodes"):
        optimizer.step()


def test_counts_add_up() -> None:
    votes = [votes_of(seed, 64) for seed in range(9)]
    for cuts in ((1, 8), (4, 5), (3, 6)):
        parts = [count_planes(votes[: cuts[0]]), count_planes(votes[cuts[0] :])]
        assert all(map(torch.equal, add_counts(parts, 9), count_planes(votes)))
