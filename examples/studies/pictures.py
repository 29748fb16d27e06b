"""The pictures of a study, from its summary; the paper's, where it compares by accuracy."""

import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

try:  # now, not after hours of runs
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullLocator
except ImportError:
    sys.exit("studies.run draws with matplotlib, which is missing: pip install 'hf-dlion[plot]'")

from .measures import MEASURES, Measure
from .records import grouped, runs_of

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
    "#7f7f7f",
    "#c49c94",
    "#aec7e8",
)
_MARKERS = "osD^vPX*<>hd"  # one fewer than colours, so that more methods still look different
_STYLES = ("-", "--", ":", "-.")  # of a method's numbers of workers, from few to many
_PANEL, _LEGEND, _HEIGHT = 3.4, 1.7, 3.6


def draw(summary: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Draws what there are runs for.

    Returns:
        The pictures' file names, with what they show.
    """
    looks = {
        label: {"color": _COLOURS[i % len(_COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
        for i, label in enumerate(summary["study"]["methods"])
    }
    measure = MEASURES[summary["study"]["measure"]]
    ordinary, attacked = runs_of(summary, "ordinary"), runs_of(summary, "attacked")
    at_several = len(grouped(ordinary, "method", "workers")) > len(grouped(ordinary, "method"))
    drawn: dict[str, tuple[Figure, str]] = {}
    if ordinary and measure.name == "loss":
        drawn["curves.png"] = _over_steps(ordinary, looks), "Validation loss over steps"
        if any(run["bits_sent"] for run in ordinary):
            shown = "Validation loss over the bits that a worker had sent by then, as counted"
            drawn["loss_over_bits.png"] = _over_steps(ordinary, looks, in_bits=True), shown
    elif ordinary:
        shown = "Test accuracy over epochs, by number of workers (the paper's Figure 2)"
        drawn["accuracy_over_epochs.png"] = _over_epochs(ordinary, looks), shown
    if ordinary and (measure.name == "accuracy" or at_several):
        shown = f"{_plain(measure)} over the number of workers{' (Figure 3)' if measure.name == 'accuracy' else ''}"
        drawn[f"{measure.name}_over_workers.png"] = _over_workers(ordinary, looks, measure), shown
    if ordinary and measure.name == "accuracy":
        shown = "Final test error over the bits that a worker sent, as counted (Figure 4)"
        drawn["error_over_bits.png"] = _over_bits(ordinary, looks), shown
    if any(run["adversaries"] for run in attacked):
        shown = f"{_plain(measure)} over the number of adversaries"
        drawn[f"{measure.name}_over_adversaries.png"] = _over_adversaries(attacked, looks, measure), shown
    for name, (figure, _) in drawn.items():
        figure.savefig(folder / name, dpi=120)
    return {name: shown for name, (_, shown) in drawn.items()}


def _plain(measure: Measure) -> str:
    return measure.title.removesuffix(", %").capitalize()


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
    """The mean of each point's values, with their range."""
    x = sorted(at for at, values in points.items() if values)
    y = [points[at] for at in x]
    axes.plot(x, [statistics.fmean(values) for values in y], **look, **more)
    axes.fill_between(x, [min(v) for v in y], [max(v) for v in y], color=look["color"], alpha=0.15, lw=0)


def _finals(runs: Sequence[Mapping[str, Any]], measure: Measure) -> list[float]:
    """Of the runs that ended with a finite one."""
    return [value for run in runs if (value := measure.of(run)) is not None]


def _over_steps(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any], in_bits: bool = False) -> Figure:
    """Loss curves; in bits, of the runs that sent some, as counted."""
    runs = [run for run in runs if run["bits_sent"] or not in_bits]
    figure, (axes,) = _panels(1)
    figure.set_size_inches(_PANEL * 1.5 + _LEGEND, _HEIGHT)
    numbers = {label: {run["workers"] for run in group} for (label,), group in grouped(runs, "method").items()}
    for (label, workers), group in grouped(runs, "method", "workers").items():
        curves = [dict(run["losses"]) for run in group]
        scale = statistics.fmean(run["bits_sent"] for run in group) if in_bits else 1
        steps = [step for step in set.intersection(*map(set, curves)) if step or not in_bits]
        points = {scale * step: [curve[step] for curve in curves] for step in steps}
        rank = sorted(numbers[label]).index(workers)
        _line(axes, points, looks[label], markersize=4, lw=1.2, ls=_STYLES[rank % len(_STYLES)])
    axes.set(xlabel="bits sent per parameter and worker" if in_bits else "step", ylabel="validation loss, nats")
    if in_bits:
        axes.set_xscale("log")
    _legend(figure, looks, [run["method"] for run in runs])
    return figure


def _over_epochs(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any]) -> Figure:
    numbers = sorted({run["workers"] for run in runs})
    figure, panels = _panels(len(numbers))
    for (label, workers), group in grouped(runs, "method", "workers").items():
        curves = [{epoch: 100 * value for epoch, value in run["accuracies"]} for run in group]
        points = {epoch: [curve[epoch] for curve in curves] for epoch in set.intersection(*map(set, curves))}
        every = max(1, len(points) // 6)
        marked = slice((len(points) - 1) % every, None, every)  # the last one in any case
        _line(panels[numbers.index(workers)], points, looks[label], markersize=4, lw=1.2, markevery=marked)
    for axes, workers in zip(panels, numbers, strict=True):
        axes.set(title=f"{workers} workers", xlabel="epoch")
    panels[0].set_ylabel("test accuracy, %")
    _legend(figure, looks, [run["method"] for run in runs])
    return figure


def _over_workers(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any], measure: Measure) -> Figure:
    figure, (axes,) = _panels(1)
    figure.set_size_inches(_PANEL * 1.5 + _LEGEND, _HEIGHT)
    for (label,), group in grouped(runs, "method").items():
        by_number = grouped(group, "workers")
        points = {number: _finals(several, measure) for (number,), several in by_number.items()}
        _line(axes, points, looks[label])
    numbers = sorted({run["workers"] for run in runs})
    axes.set_xscale("log", base=2)
    axes.set_xticks(numbers, [str(number) for number in numbers])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel="workers", ylabel=measure.title)
    _legend(figure, looks, [run["method"] for run in runs])
    return figure


def _over_bits(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any]) -> Figure:
    figure, (axes,) = _panels(1)
    figure.set_size_inches(_PANEL * 1.5 + _LEGEND, _HEIGHT)
    numbers = sorted({run["workers"] for run in runs})
    sizes = {number: 5 + 6 * i / max(1, len(numbers) - 1) for i, number in enumerate(numbers)}
    for (label,), several in grouped(runs, "method").items():
        points = []
        counted = [run for run in several if run["bits_sent"] is not None]
        for (number,), group in sorted(grouped(counted, "workers").items()):
            bits = statistics.fmean(run["bits_sent"] for run in group)
            error = statistics.fmean(100 * (1 - run["final_accuracy"]) for run in group)
            points.append((bits, error))
            axes.plot(bits, error, **looks[label], markersize=sizes[number], alpha=0.8)
        axes.plot(
            [bits for bits, _ in points], [error for _, error in points], color=looks[label]["color"], lw=0.8, alpha=0.6
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda bits, _: f"{bits:g}"))
    axes.set(xlabel="bits sent per parameter, worker and step", ylabel="final test error, %")
    keys = [Line2D([], [], color="grey", marker="o", ls="", markersize=sizes[n], label=f"{n} workers") for n in numbers]
    _legend(figure, {label: look | {"ls": ""} for label, look in looks.items()}, [run["method"] for run in runs], keys)
    return figure


def _over_adversaries(runs: Sequence[Mapping[str, Any]], looks: Mapping[str, Any], measure: Measure) -> Figure:
    kinds = sorted({run["adversary"] for run in runs if run["adversaries"]})
    figure, panels = _panels(len(kinds))
    figure.set_size_inches(_PANEL * max(1.5, len(kinds)) + _LEGEND, _HEIGHT)
    titles = {"flip": "they negate their gradient", "random": "they draw its signs at random"}
    for axes, kind in zip(panels, kinds, strict=True):
        here = [run for run in runs if run["adversary"] in (None, kind)]
        for (label,), group in grouped(here, "method").items():
            by_count = grouped(group, "adversaries")
            points = {count: _finals(several, measure) for (count,), several in by_count.items()}
            _line(axes, points, looks[label])
        axes.set(title=titles.get(kind, kind), xlabel=f"adversaries among {runs[0]['workers']} workers")
        axes.set_xticks(sorted({run["adversaries"] for run in here}))
    panels[0].set_ylabel(measure.title)
    _legend(figure, looks, [run["method"] for run in runs])
    return figure
