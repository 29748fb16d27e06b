"""What a method should send, per parameter and step: as the paper counts it, and as this package's wire does."""

import math
from typing import NamedTuple

DROP_SHARE = 0.96
_SPARSE, _DENSE = ("graddrop", "dgc"), ("glion", "gadamw", "gmuon")
_MAJORITIES = ("dlion_mavo", "dsignum_mavo", "dmuon_mavo")
_AVERAGES = ("dlion_avg", "dsignum_avg", "dmuon_avg")
PREDICTED = (*_MAJORITIES, *_AVERAGES, *_DENSE, "terngrad", *_SPARSE)


class Bits(NamedTuple):
    """Bits per parameter and step, towards the decision and back."""

    up: float
    down: float


def paper_bits(method: str, workers: int, drop_share: float = DROP_SHARE) -> Bits:
    """Between a worker and the server: Table 1 of arXiv 2404.00438, with Signum and Muon as Lion and graddrop as DGC.

    Raises:
        KeyError: the method is not one of the paper's.
    """
    table = {
        **dict.fromkeys(_DENSE, Bits(32, 32)),
        **dict.fromkeys(_MAJORITIES, Bits(1, 1)),
        **dict.fromkeys(_AVERAGES, Bits(1, math.log2(workers + 1))),
        **dict.fromkeys(_SPARSE, Bits((1 - drop_share) * 32, 32)),
        "terngrad": Bits(1.5, math.log2(2 * workers + 1)),
    }
    return table[method]


def wire_bits(
    method: str, workers: int, tie: str = "auto", exchange: str = "auto", drop_share: float = DROP_SHARE
) -> Bits:
    """What one of N ranks sends, when the ranks are the server together: its own part needs no wire.

    Args:
        method: a name of hf_dlion's `METHODS`.
        workers: N.
        tie: `vote_tie` of the training arguments.
        exchange: `vote_exchange` of the training arguments.
        drop_share: of graddrop and dgc, after their warm-up.

    Raises:
        KeyError: no such method.
    """
    others, share = workers - 1, (workers - 1) / workers
    if method in _MAJORITIES or method in _AVERAGES:
        zeros = tie == "zero" or (tie == "auto" and method != "dmuon_mavo")
        values = workers + 1 if method in _AVERAGES else 3 if workers % 2 == 0 and zeros else 2
        sharded, gathered = Bits(share, share * math.ceil(math.log2(values))), Bits(others, 0)
        if exchange == "auto":
            return gathered if sum(gathered) <= sum(sharded) else sharded
        return gathered if exchange == "gather" else sharded
    table = {
        **dict.fromkeys(_DENSE, Bits(share * 32, share * 32)),
        **dict.fromkeys(_SPARSE, Bits(others * (1 - drop_share) * 64, 0)),  # an index and a value an entry
        "terngrad": Bits(share * 2, share * math.ceil(math.log2(2 * workers + 1))),
    }
    return table[method]


def local_bits(aggregation: str, workers: int, every: int, tie: str = "auto", exchange: str = "auto") -> Bits:
    """As `wire_bits`, of local steps: a vote on displacements, with a scale for 256 of them, or their mean.

    Args:
        aggregation: `outer_aggregation` of the training arguments.
        workers: N.
        every: `local_steps`.
        tie: `vote_tie`.
        exchange: `vote_exchange`.
    """
    tie = "alternate" if tie == "auto" else tie
    method = {"mavo": "dlion_mavo", "avg": "dlion_avg", "mean": "gadamw"}[aggregation]
    votes = wire_bits(method, workers, tie, exchange)
    scale = 0 if aggregation == "mean" else (workers - 1) / workers * 32 / 256
    return Bits((votes.up + scale) / every, (votes.down + scale) / every)
