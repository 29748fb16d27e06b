"""Runs one training script by several methods, each at its best learning rate of a few, and compares them.

    python examples/compare_runs.py examples/configs/studies/gpt2_text.yaml --output out/gpt2_text

A study is a YAML file: the script, arguments for all runs, the methods with their number of workers and their
learning rates, and the seeds. Every method is run once per learning rate with the first seed; the one with the
lowest validation loss is run with the other seeds too. A run that has its `results.json` is not run again, so the
command can be stopped and repeated. It leaves, beside the runs, `summary.json`, `curves.png`, and `README.md` with the
table. `--publish FOLDER` copies these, and of each method the model card of its best run with the JSON behind it, and
no weights.
"""

import argparse
import json
import math
import re
import shlex
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from study_cells import Cell, StudyError, results_of, run_cells

PROCESSES = "examples/configs/cpu_2.yaml"


@dataclass(frozen=True)
class Study:
    """What is compared. `methods` are by label; their entries besides `workers` and `learning_rates` are arguments."""

    title: str
    script: str
    arguments: dict[str, Any]
    methods: dict[str, dict[str, Any]]
    seeds: list[int]
    note: str = ""

    @classmethod
    def read(cls, path: Path) -> "Study":
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError) as error:
            raise StudyError(f"{path}: cannot be read as a study ({error}). See examples/configs/studies/.") from error

    def cell(self, label: str, learning_rate: float, seed: int) -> Cell:
        method = self.methods[label]
        own = {key: value for key, value in method.items() if key not in ("workers", "learning_rates")}
        name, workers = re.sub("[^a-z0-9_]+", "_", label.lower()), method["workers"]
        launcher = ("-m", "accelerate.commands.launch", "--config_file", PROCESSES, "--num_processes", str(workers))
        return Cell(
            folder=f"{name}/lr_{learning_rate:g}/seed_{seed}",
            script=self.script,
            arguments=self.arguments | own | {"learning_rate": learning_rate, "seed": seed},
            needs=("validation_loss_last", "loss_key", "log_history"),
            launcher=launcher if workers > 1 else (),
            processes=workers,
        )


def run(cell: Cell, root: Path) -> dict[str, Any]:
    """The cell's results, from its folder or from a run now."""
    failures = run_cells([cell], root)
    found = results_of(cell, root)
    if found is None:
        raise StudyError(f"{cell.folder} {failures[cell.folder]}")
    return found


def compare(study: Study, root: Path) -> dict[str, Any]:
    """All runs of a study: by method, the search and the final runs."""
    outcome = {}
    for method, settings in study.methods.items():
        first, *others = study.seeds
        search = {rate: run(study.cell(method, rate, first), root) for rate in settings["learning_rates"]}
        best = min(search, key=lambda rate: _loss(search[rate]))
        final = {first: search[best]} | {seed: run(study.cell(method, best, seed), root) for seed in others}
        outcome[method] = {
            "workers": settings["workers"],
            "learning_rate": best,
            "search": {f"{rate:g}": _loss(results) for rate, results in search.items()},
            "final": {str(seed): _kept(results) for seed, results in final.items()},
        }
    return outcome


def _loss(results: dict[str, Any]) -> float:
    loss: float = results["validation_loss_last"]
    return loss if math.isfinite(loss) else math.inf


def _kept(results: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in results.items() if key != "log_history"} | {
        "validation_curve": [
            (entry["step"], value)
            for entry in results["log_history"]
            for key, value in entry.items()
            if key == results["loss_key"]
        ]
    }


def table(outcome: dict[str, Any]) -> str:
    """Validation loss and perplexity at the best learning rate, mean and range over the seeds."""
    reference = next(iter(outcome))
    base = _mean(outcome[reference], "validation_loss_last")
    lines = [
        "| method | workers | learning rates tried | validation loss (min to max) | perplexity | "
        f"against {reference} | bytes a worker sent |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method, found in outcome.items():
        losses = [results["validation_loss_last"] for results in found["final"].values()]
        mean = statistics.fmean(losses)
        tried = ", ".join(
            f"**{rate}**: {loss:.3f}" if float(rate) == found["learning_rate"] else f"{rate}: {loss:.3f}"
            for rate, loss in found["search"].items()
        )
        sent = next(iter(found["final"].values()))["bytes_sent"]
        spread = f"{mean:.4f} ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else f"{mean:.4f}"
        lines.append(
            f"| {method} | {found['workers']} | {tried} | {spread} | {math.exp(mean):.2f} | "
            f"{math.exp(mean - base) - 1:+.1%} | {'not counted' if sent is None else f'{sent:,}'} |"
        )
    return "\n".join(lines)


def _mean(found: dict[str, Any], key: str) -> float:
    return statistics.fmean(results[key] for results in found["final"].values())


def draw(outcome: dict[str, Any], path: Path) -> None:
    """Validation loss over steps, the mean over the seeds with their range."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for method, found in outcome.items():
        curves = [dict(results["validation_curve"]) for results in found["final"].values()]
        steps = sorted(set.intersection(*map(set, curves)))
        values = [[curve[step] for curve in curves] for step in steps]
        (line,) = axes.plot(steps, [statistics.fmean(v) for v in values], marker=".", label=method)
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
    axes.set(xlabel="step", ylabel="validation loss, nats per token")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def publish(study: Study, outcome: dict[str, Any], root: Path, target: Path) -> None:
    """Copies the comparison, and each method's best run without its weights."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("README.md", "summary.json", "curves.png"):
        shutil.copy(root / name, target / name)
    for method, found in outcome.items():
        source = root / study.cell(method, found["learning_rate"], study.seeds[0]).folder
        own = target / source.relative_to(root).parts[0]
        own.mkdir(exist_ok=True)
        for pattern in ("README.md", "*.png", "results.json", "*shot.json"):
            for path in source.glob(pattern):
                shutil.copy(path, own / path.name)


def main() -> None:
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, help="YAML file of the study")
    parser.add_argument("--output", type=Path, required=True, help="folder for the runs and the comparison")
    parser.add_argument("--publish", type=Path, help="folder for the comparison and the model cards")
    options = parser.parse_args()
    study = Study.read(options.study)
    outcome = compare(study, options.output)
    command = shlex.join(["python", *sys.argv])
    record = {"title": study.title, "command": command, "study": vars(study), "methods": outcome}
    (options.output / "summary.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(outcome, options.output / "curves.png")
    text = [
        f"# {study.title}\n",
        f"{study.note.strip()}\n",
        table(outcome) + "\n",
        "Bold: the learning rate of the lowest validation loss, at which the runs with the other seeds were made.\n",
        "![Validation loss over steps](curves.png)\n",
        f"```bash\n{command}\n```\n",
    ]
    (options.output / "README.md").write_text("\n".join(text), encoding="utf-8")
    print(text[2])
    if options.publish is not None:
        publish(study, outcome, options.output, options.publish)


if __name__ == "__main__":
    try:
        main()
    except StudyError as error:
        sys.exit(f"compare_runs.py: {error}")
    except KeyboardInterrupt:
        sys.exit("compare_runs.py: stopped. The same command goes on.")
