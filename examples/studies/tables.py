"""The tables of a study's page, from its summary."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from .bits import DROP_SHARE, PREDICTED, Bits, local_bits, paper_bits, wire_bits
from .measures import MEASURES, Measure
from .records import grouped, runs_of


def accuracy_table(summary: Mapping[str, Any]) -> str:
    """A row a method, a column a number of workers."""
    study, measure = summary["study"], MEASURES["accuracy"]
    groups = grouped(runs_of(summary, "ordinary"), "method", "workers")
    numbers = sorted({number for label in study["methods"] for number in _workers(study, label)})
    rows = []
    for label in study["methods"]:
        rate, seeds, own = summary["learning_rates"].get(label), len(_seeds(study, label)), _workers(study, label)
        cells = [_spread(groups.get((label, n), []), seeds, measure) if n in own else "-" for n in numbers]
        decay = summary["weight_decays"][label]
        rows.append([f"`{label}`", "none found" if rate is None else f"{rate:g}", f"{decay:g}", *cells])
    return _table(["method", "learning rate", "weight decay", *(f"{workers} workers" for workers in numbers)], rows)


def loss_table(summary: Mapping[str, Any]) -> str:
    """A row a method and number of workers; perplexity against the first row's."""
    study, measure = summary["study"], MEASURES["loss"]
    groups = grouped(runs_of(summary, "ordinary"), "method", "workers")
    rows, reference = [], None
    for label in study["methods"]:
        for workers in _workers(study, label):
            runs = groups.get((label, workers), [])
            losses = [math.nan if run["final_loss"] is None else run["final_loss"] for run in runs]
            mean = statistics.fmean(losses) if losses else math.nan
            reference = mean if reference is None else reference
            against = _perplexity(mean - reference)
            rate, sent = summary["learning_rates"].get(label), runs[0]["bytes_sent"] if runs else None
            rows.append(
                [
                    label,
                    str(workers),
                    "none found" if rate is None else f"{rate:g}",
                    f"{summary['weight_decays'][label]:g}",
                    _spread(runs, len(_seeds(study, label)), measure),
                    "-" if math.isnan(mean) else f"{_perplexity(mean):.2f}",
                    "-" if math.isnan(against) else f"{against - 1:+.1%}",
                    "not counted" if sent is None else f"{sent:,}",
                ]
            )
    head = ["method", "workers", "learning rate", "weight decay", "validation loss", "perplexity"]
    return _table([*head, f"against {next(iter(study['methods']))}", "bytes a worker sent"], rows)


def adversaries_table(summary: Mapping[str, Any]) -> str:
    """A row a method and kind of adversaries, a column a number of them."""
    study, measure = summary["study"], MEASURES[summary["study"]["measure"]]
    wanted = study["adversaries"]
    groups = grouped(runs_of(summary, "attacked"), "method", "adversary", "adversaries")
    seeds, counts = len(wanted["seeds"] or study["seeds"][:1]), [0, *wanted["counts"]]
    rows = []
    for kind in wanted["kinds"]:
        for label in wanted["methods"]:
            found = [groups.get((label, kind if count else None, count), []) for count in counts]
            rows.append([f"`{label}`", kind, *(_spread(runs, seeds, measure) for runs in found)])
    return _table(["method", "adversaries", *map(str, counts)], rows)


def bits_table(runs: Sequence[Mapping[str, Any]]) -> str | None:
    """Of each method and number of workers, what is predicted, and what the first run counted; None without any."""
    rows = []
    for (label, workers), (run, *_) in grouped(runs, "method", "workers").items():
        settings, sent, received = run["settings"], run["bits_sent"], run["bits_received"]
        every = int(settings.get("local_steps", 0))
        voted = settings.get("gradient_votes")
        if not (every or voted or settings["optim"] in PREDICTED) or sent is None or workers == 1:
            continue
        drop = float(settings.get("drop_share", DROP_SHARE))
        votes = {"tie": settings.get("vote_tie", "auto"), "exchange": settings.get("vote_exchange", "auto")}
        paper: Bits | None = None
        wire: Bits | None = None
        if every:
            wire = local_bits(settings.get("outer_aggregation", "mavo"), workers, every, **votes)
        elif voted:
            wire = wire_bits(f"dlion_{voted}", workers, exchange=votes["exchange"])
        elif settings.get("muon_rest") != "average":  # else it depends on how large the rest is
            paper = paper_bits(settings["optim"], workers, drop)
            wire = wire_bits(settings["optim"], workers, **votes, drop_share=drop)
        rows.append(
            [
                f"`{label}`",
                str(workers),
                f"{paper.up:.2f}, {paper.down:.2f}" if paper else "-",
                f"{wire.up:.3f} + {wire.down:.3f} = {sum(wire):.3f}" if wire else "-",
                f"{sent:.3f}",
                "not counted" if received is None else f"{received:.3f}",
                f"{sent / sum(wire):.3f}" if wire and sum(wire) else "-",
            ]
        )
    head = ["method", "workers", "paper: up, down", "predicted: up + down", "counted: sent", "received"]
    return _table([*head, "sent / predicted"], rows) if rows else None


def search_table(summary: Mapping[str, Any]) -> str:
    """A row a method: its grid, with what each learning rate came to."""
    measure = MEASURES[summary["study"]["measure"]]
    rows = []
    for label, found in summary["search"].items():
        tried = {
            rate: "no result" if value is None else measure.shown(measure.scale * value)
            for rate, value in found["tried"]
        }
        shown = [
            f"**{rate:g}: {value}**" if rate == found["best"] else f"{rate:g}: {value}" for rate, value in tried.items()
        ]
        remark = "none found" if found["best"] is None else "at the edge of the grid" if found["at_edge"] else ""
        rows.append([f"`{label}`", ", ".join(shown), remark])
    return _table(["method", f"learning rate: {measure.name}", ""], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def _spread(runs: Sequence[Mapping[str, Any]], wanted: int, measure: Measure) -> str:
    """Mean, range and number of seeds."""
    if not runs:
        return "missing"
    count = f"{len(runs)}" if len(runs) == wanted else f"{len(runs)} of {wanted}"
    found = [value for run in runs if (value := measure.of(run)) is not None]
    if len(found) < len(runs):
        return f"{len(runs) - len(found)} not finite; {count}"
    digits = measure.digits
    spread = f" ({min(found):.{digits}f} to {max(found):.{digits}f})" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.{digits}f}{spread}; {count}"


def _perplexity(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _workers(study: Mapping[str, Any], label: str) -> list[int]:
    workers = study["methods"][label].get("workers", study["workers"])
    return [workers] if isinstance(workers, int) else workers


def _seeds(study: Mapping[str, Any], label: str) -> list[int]:
    seeds: list[int] = study["methods"][label].get("seeds", study["seeds"])
    return seeds
