"""The paper's pictures of a comparison of methods, from its summary."""

import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:  # now, not after hours of runs
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullLocator
except ImportError:
    sys.exit("compare_methods.py draws with matplotlib, which is missing: pip install 'hf-dlion[plot]'")

_COLOURS = (
    "#1f77b4",
    "#d62728",
    "#17becf",
    "#ff7f0e",
    "#2ca02c",
    "#000000",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#bcbd22",
)
_MARKERS = "osD^vPX*<>"
_PANEL, _LEGEND, _HEIGHT = 3.4, 1.7, 3.6

Groups = Mapping[tuple[Any, ...], Sequence[Mapping[str, Any]]]


def runs_of(summary: Mapping[str, Any], part: str) -> list[dict[str, Any]]:
    """The finished runs of `ordinary` or of `attacked`."""
    wanted = set(summary[part])
    return [run for run in summary["runs"] if run["folder"] in wanted]


def grouped(runs: Sequence[Mapping[str, Any]], *keys: str) -> Groups:
    groups = defaultdict(list)
    for run in runs:
        groups[tuple(run[key] for key in keys)].append(run)
    return dict(groups)


def draw(summary: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draws what there are runs for.

    Returns:
        The pictures' file names, with what they show.
    """
    looks = {
        label: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, label in enumerate(summary["study"]["methods"])
    }
    ordinary, attacked = runs_of(summary, "ordinary"), runs_of(summary, "attacked")
    drawn = {}
    if ordinary:
        _over_epochs(ordinary, looks).savefig(folder / "accuracy_over_epochs.png", dpi=120)
        drawn["accuracy_over_epochs.png"] = "Test accuracy over epochs, by number of workers (the paper's Figure 2)"
        _over_workers(ordinary, looks).savefig(folder / "accuracy_over_workers.png", dpi=120)
        drawn["accuracy_over_workers.png"] = "Final test accuracy over the number of workers (Figure 3)"
        _over_bits(ordinary, looks).savefig(folder / "error_over_bits.png", dpi=120)
        drawn["error_over_bits.png"] = "Final test error over the bits that a worker sent, as counted (Figure 4)"
    if any(run["adversaries"] for run in attacked):
        _over_adversaries(attacked, looks).savefig(folder / "accuracy_over_adversaries.png", dpi=120)
        drawn["accuracy_over_adversaries.png"] = "Final test accuracy over the number of adversaries"
    return drawn


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_PANEL * count + _LEGEND, _HEIGHT), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0].tolist()
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def _legend(figure: Figure, looks: Mapping[str, Any], shown: Sequence[str], more: Sequence[Line2D] = ()) -> None:
    lines = [Line2D([], [], label=label, **look) for label, look in looks.items() if label in shown]
    figure.legend(handles=[*lines, *more], loc="outside right upper", frameon=False)


def _line(axes: Axes, points: Mapping[float, Sequence[float]], look: Mapping[str, Any], **more: Any) -> None:
    """The mean of each point's values, in per cent, with their range."""
    x = sorted(points)
    percent = [[100 * value for value in points[at]] for at in x]
    axes.plot(x, [statistics.fmean(values) for values in percent], **look, **more)
    axes.fill_between(x, [min(v) for v in percent], [max(v) for v in percent], color=look["color"], alpha=0.15, lw=0)


def _over_epochs(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any]) -> Figure:
    numbers = sorted({run["workers"] for run in runs})
    figure, panels = _panels(len(numbers))
    for (label, workers), group in grouped(runs, "method", "workers").items():
        curves = [dict(run["accuracies"]) for run in group]
        points = {epoch: [curve[epoch] for curve in curves] for epoch in set.intersection(*map(set, curves))}
        every = max(1, len(points) // 6)
        marked = slice((len(points) - 1) % every, None, every)  # the last one in any case
        _line(panels[numbers.index(workers)], points, looks[label], markersize=4, lw=1.2, markevery=marked)
    for axes, workers in zip(panels, numbers, strict=True):
        axes.set(title=f"{workers} workers", xlabel="epoch")
    panels[0].set_ylabel("test accuracy, %")
    _legend(figure, looks, [run["method"] for run in runs])
    return figure


def _over_workers(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any]) -> Figure:
    figure, (axes,) = _panels(1)
    figure.set_size_inches(_PANEL * 1.5 + _LEGEND, _HEIGHT)
    for (label,), group in grouped(runs, "method").items():
        by_number = grouped(group, "workers")
        points = {number: [run["final_accuracy"] for run in several] for (number,), several in by_number.items()}
        _line(axes, points, looks[label])
    numbers = sorted({run["workers"] for run in runs})
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="workers", ylabel="final test accuracy, %")
    _legend(figure, looks, [run["method"] for run in runs])
    return figure


def _over_bits(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any]) -> Figure:
    figure, (axes,) = _panels(1)
    figure.set_size_inches(_PANEL * 1.5 + _LEGEND, _HEIGHT)
    numbers = sorted({run["workers"] for run in runs})
    sizes = {number: 5 + 6 * i / max(1, len(numbers) - 1) for i, number in enumerate(numbers)}
    for (label,), several in grouped(runs, "method").items():
        points = []
        for (number,), group in sorted(grouped(several, "workers").items()):
            bits = statistics.fmean(run["bits_sent"] for run in group)
            error = statistics.fmean(100 * (1 - run["final_accuracy"]) for run in group)
            points.append((bits, error))
            axes.plot(bits, error, **looks[label], markersize=sizes[number], alpha=0.8)
        axes.plot(*zip(*points, strict=True), color=looks[label]["color"], lw=0.8, alpha=0.6)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}"))
    axes.set(xlabel="bits sent per parameter, worker and step", ylabel="final test error, %")
    keys = [Line2D([], [], color="grey", marker="o", ls="", markersize=sizes[n], label=f"{n} workers") for n in numbers]
    _legend(figure, {label: look | {"ls": ""} for label, look in looks.items()}, [run["method"] for run in runs], keys)
    return figure


def _over_adversaries(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any]) -> Figure:
    kinds = sorted({run["adversary"] for run in runs if run["adversaries"]})
    figure, panels = _panels(len(kinds))
    figure.set_size_inches(_PANEL * max(1.5, len(kinds)) + _LEGEND, _HEIGHT)
    titles = {"flip": "they negate their gradient", "random": "they draw its signs at random"}
    for axes, kind in zip(panels, kinds, strict=True):
        here = [run for run in runs if run["adversary"] in (None, kind)]
        for (label,), group in grouped(here, "method").items():
            by_count = grouped(group, "adversaries")
            points = {count: [run["final_accuracy"] for run in several] for (count,), several in by_count.items()}
            _line(axes, points, looks[label])
        axes.set(title=titles.get(kind, kind), xlabel=f"adversaries among {runs[0]['workers']} workers")
        axes.set_xticks(sorted({run["adversaries"] for run in here}))
    panels[0].set_ylabel("final test accuracy, %")
    _legend(figure, looks, [run["method"] for run in runs])
    return figure
