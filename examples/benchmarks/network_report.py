"""The table and the picture of `network.py`, from what its `results.json` holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .links import UNLIMITED, bits_per_second

METHODS = ("dlion_mavo", "dlion_mavo_alternate", "dlion_avg", "local_16", "ddp_fp32", "ddp_fp16", "ddp_powersgd")
BASELINE = "ddp_fp32"
ALONE = "computing"
"""Fused AdamW on a worker's own gradients: what a whole step takes without a network."""
STREAMED = "_streamed"
"""Of the name of local steps: four parts vote in turn, and a vote takes effect two steps later."""
WHOLE_STEP = (
    "dmuon_mavo",
    "dmuon_three_steps",
    "dmuon_averages",
    "dmuon_avg",
    "gradient_votes",
    "dlion_mavo_after",
    "local_16_streamed",
    ALONE,
)
"""Further methods, of a whole step."""
LOOKS = {
    "dlion_mavo": ("o", "C0"),
    "dlion_mavo_alternate": ("h", "C6"),
    "dlion_avg": ("s", "C9"),
    "local_16": ("*", "C5"),
    "local_16_streamed": ("X", "C5"),
    "ddp_fp32": ("^", "C3"),
    "ddp_fp16": ("v", "C1"),
    "ddp_powersgd": ("D", "C2"),
    "dmuon_mavo": ("P", "C4"),
    "dmuon_three_steps": ("p", "navy"),
    "dmuon_averages": ("d", "black"),
    "dmuon_avg": ("H", "C8"),
    "gradient_votes": ("<", "C7"),
    "dlion_mavo_after": ("x", "C0"),
    ALONE: (".", "0.4"),
}


def table(report: dict[str, Any]) -> str:
    """The results in Markdown. Bits are those that a worker sends per parameter and step."""
    alone = {r["rate"]: r["median"] for r in report["results"] if r["method"] == ALONE}
    baseline = {r["rate"]: r["median"] for r in report["results"] if r["method"] == BASELINE}
    ratios = f"{BASELINE} / it" + f" | it / {ALONE}" * bool(alone)
    lines = [f"| link | method | seconds, median (min to max) | {ratios} | bits, interface | ledger |"]
    lines.append("| --- " * (6 + bool(alone)) + "|")
    for r in report["results"]:
        ratio = [f"{baseline[r['rate']] / r['median']:.2f}" if r["rate"] in baseline else "-"]
        ratio += [f"{r['median'] / alone[r['rate']]:.2f}"] if r["rate"] in alone else []
        bits = [r[f"{counter}_bits_per_parameter"] for counter in ("interface", "ledger")]
        cells = [r["rate"], r["method"], f"{r['median']:.4f} ({r['min']:.4f} to {r['max']:.4f})", *ratio]
        lines.append(f"| {' | '.join(cells + [f'{b:.3f}' if b else '-' for b in bits])} |")
    facts = ", ".join(f"{name} {fact}" for name, fact in report["machine"].items())
    return "\n".join([*lines, "", f"{title(report)}; {report['network']}; {facts}."])


def title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    tokens = settings.get("tokens", 0)
    what = f"A step on {tokens} tokens," if tokens else "One update of"
    return f"{what} {settings['parameters'] / 1e6:.1f} M parameters, {settings['workers']} workers"


def plot(report: dict[str, Any], path: Path) -> None:
    """Step time over link rate, a line a method. What is unlimited stands apart, at the right."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    rates = sorted({r["rate"] for r in report["results"]}, key=bits_per_second)
    top = 10 * max([bits_per_second(rate) for rate in rates if rate != UNLIMITED], default=1e9)
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for method, (marker, color) in LOOKS.items():
        points = [r for r in report["results"] if r["method"] == method]
        limited = [r for r in points if r["rate"] != UNLIMITED]
        for part, style, label in ((limited, "-", None), (points, "none", method)) if points else ():
            places = [min(top, bits_per_second(r["rate"])) for r in part]
            spread = [[r["median"] - r["min"] for r in part], [r["max"] - r["median"] for r in part]]
            look: dict[str, Any] = {"linestyle": style, "marker": marker, "color": color, "capsize": 3}
            axes.errorbar(places, [r["median"] for r in part], spread, label=label, **look)
    axes.set(xscale="log", yscale="log", xlabel="link rate (bit/s, each way)", ylabel="step time (s)")
    axes.set_xticks([min(top, bits_per_second(rate)) for rate in rates], rates)
    axes.xaxis.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right center")
    figure.suptitle(f"{title(report)} (bars: min to max)")
    figure.savefig(path, dpi=110)
