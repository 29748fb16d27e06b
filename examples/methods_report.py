"""The page of a comparison of methods, from its summary: tables, pictures, and what is missing."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from method_bits import DROP_SHARE, paper_bits, wire_bits
from methods_pictures import grouped, runs_of


def page(summary: Mapping[str, Any], pictures: Mapping[str, str]) -> str:
    study = summary["study"]
    parts = [
        f"# {summary['title']}",
        study["findings"].strip(),
        study["note"].strip(),
        _absent(summary),
        "## Final test accuracy, %\n\nMean (min to max) over the seeds; number of seeds. One learning rate and weight "
        f"decay for all runs of a method.\n\n{accuracy_table(summary)}",
        *(f"{shown}:\n\n![{shown}]({name})" for name, shown in pictures.items()),
        _adversaries(summary),
        bits_section(runs_of(summary, "ordinary")),
        _search(summary),
        _how(summary),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


BITS = """## Bits per parameter and step (the paper's Table 1)

The paper counts between a worker and the server. Here the workers are the server together: each one sends its part of
the votes up to the others, and its part of the decision down to them. "Predicted" are the bits of that code; "counted"
is what a worker's ledger has, of which the parts of gradients that do not fill a block, and sizes, are the rest.

"""


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


def accuracy_table(summary: Mapping[str, Any]) -> str:
    study = summary["study"]
    groups = grouped(runs_of(summary, "ordinary"), "method", "workers")
    rows = []
    for label, own in study["methods"].items():
        rate, seeds = summary["learning_rates"].get(label), len(own.get("seeds", study["seeds"]))
        cells = [_accuracy(groups.get((label, workers), []), seeds) for workers in study["workers"]]
        decay = summary["weight_decays"][label]
        rows.append([f"`{label}`", "none found" if rate is None else f"{rate:g}", f"{decay:g}", *cells])
    return _table(
        ["method", "learning rate", "weight decay", *(f"{workers} workers" for workers in study["workers"])], rows
    )


def _accuracy(runs: Sequence[Mapping[str, Any]], wanted: int) -> str:
    if not runs:
        return "missing"
    found = [100 * run["final_accuracy"] for run in runs]
    count = f"{len(found)}" if len(found) == wanted else f"{len(found)} of {wanted}"
    spread = f" ({min(found):.2f} to {max(found):.2f})" if len(found) > 1 else ""
    return f"{statistics.fmean(found):.2f}{spread}; {count}"


def bits_section(runs: Sequence[Mapping[str, Any]]) -> str:
    """Of each method and number of workers, what is predicted, and what the first run counted."""
    if not runs:
        return ""
    rows = []
    for (label, workers), (run, *_) in grouped(runs, "method", "workers").items():
        settings = run["settings"]
        drop = float(settings.get("drop_share", DROP_SHARE))
        paper = paper_bits(settings["optim"], workers, drop)
        votes = {"tie": settings.get("vote_tie", "zero"), "exchange": settings.get("vote_exchange", "auto")}
        wire = wire_bits(settings["optim"], workers, **votes, drop_share=drop)
        sent, received = run["bits_sent"], run["bits_received"]
        rows.append(
            [
                f"`{label}`",
                str(workers),
                f"{paper.up:.2f}, {paper.down:.2f}",
                f"{wire.up:.3f} + {wire.down:.3f} = {sum(wire):.3f}",
                f"{sent:.3f}",
                "not counted" if received is None else f"{received:.3f}",
                f"{sent / sum(wire):.3f}" if sum(wire) else "-",
            ]
        )
    head = ["method", "workers", "paper: up, down", "predicted: up + down", "counted: sent", "received"]
    return BITS + _table([*head, "sent / predicted"], rows)


def _adversaries(summary: Mapping[str, Any]) -> str:
    wanted = summary["study"]["adversaries"]
    if wanted is None:
        return ""
    groups = grouped(runs_of(summary, "attacked"), "method", "adversary", "adversaries")
    seeds = len(wanted["seeds"] or summary["study"]["seeds"][:1])
    rows = [
        [
            f"`{label}`",
            kind,
            *(
                _accuracy(groups.get((label, kind if count else None, count), []), seeds)
                for count in [0, *wanted["counts"]]
            ),
        ]
        for kind in wanted["kinds"]
        for label in wanted["methods"]
    ]
    table = _table(["method", "adversaries", "0", *map(str, wanted["counts"])], rows)
    return (
        f"## With adversaries\n\nFinal test accuracy, % (and seeds, as above), with so many of {wanted['workers']} "
        f"workers that negate their gradient (`flip`) or draw its signs at random (`random`).\n\n{table}"
    )


def _search(summary: Mapping[str, Any]) -> str:
    tune = summary["study"]["tune"]
    if summary["search"] is None:
        return "## Learning rates\n\nThe study's, or the paper's for CIFAR-10 where it gives none; none was searched."
    rows, edges = [], []
    for label, found in summary["search"].items():
        tried = [(rate, "no result" if value is None else f"{100 * value:.2f}") for rate, value in found["accuracies"]]
        shown = [f"**{rate:g}: {value}**" if rate == found["best"] else f"{rate:g}: {value}" for rate, value in tried]
        remark = "none found" if found["best"] is None else "at the edge of the grid" if found["at_edge"] else ""
        rows.append([f"`{label}`", ", ".join(shown), remark])
        edges += [f"`{label}`"] * found["at_edge"]
    epochs = tune["epochs"] or summary["study"]["arguments"].get("num_train_epochs", "the script's")
    factors = ", ".join(f"{factor:g}" for factor in sorted(tune["factors"]))
    text = (
        f"## Learning rates searched\n\nEach method's usual one (the paper's, if the study gives no other) times "
        f"{factors}; {tune['workers']} workers, {epochs} epochs, seed {tune['seed']}. Bold: the highest accuracy at "
        "the end, in %; of equals, the lower loss. It was **chosen on the test set**, equally for all: there is no "
        f"validation split.\n\n{_table(['method', 'learning rate: accuracy', ''], rows)}"
    )
    if edges:
        text += f"\n\nBest at the edge of their grid, so that another may be better still: {', '.join(edges)}."
    return text


def _absent(summary: Mapping[str, Any]) -> str:
    without = [label for label in summary["study"]["methods"] if label not in summary["learning_rates"]]
    lines = [
        f"- `{folder}`{', failed: see its `log.txt`' if folder in summary['failed'] else ''}"
        for folder in summary["missing"]
    ]
    lines += [f"- all of `{label}`: no run of its search is finished" for label in without]
    if not lines:
        return ""
    return "**Incomplete.** These runs are missing:\n\n" + "\n".join(lines)


def _how(summary: Mapping[str, Any]) -> str:
    where = {
        f"{run['machine']}, with {', '.join(f'{name} {number}' for name, number in run['versions'].items())}": None
        for run in summary["runs"]
        if run["machine"] and run["versions"]
    }
    return "\n\n".join(["## How", f"```bash\n{summary['command']}\n```", *(f"On {one}." for one in where)])
