"""The runs of a study, in their order, and the command of each."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .cells import Cell, StudyError
from .study import Study, slug

NEEDS = ("log_history", "trainable_parameters", "bytes_counted_steps")


@dataclass(frozen=True)
class Run:
    """One training run, by what it is about."""

    method: str
    workers: int
    seed: int
    learning_rate: float
    epochs: float | None = None  # of a search, where they differ from the study's
    adversaries: int = 0
    adversary: str | None = None

    @property
    def folder(self) -> str:
        parts = [slug(self.method)]
        if self.epochs is not None:
            parts.append(f"search_{self.epochs:g}_epochs")
        parts.append(f"workers_{self.workers}")
        if self.adversaries:
            parts.append(f"{self.adversary}_{self.adversaries}")
        return "/".join([*parts, f"lr_{self.learning_rate:g}", f"seed_{self.seed}"])


def cell(study: Study, run: Run) -> Cell:
    """The run as a command: with virtual workers in one process, or with a process each."""
    chosen: dict[str, Any] = {"learning_rate": run.learning_rate, "seed": run.seed}
    if study.virtual:
        chosen["virtual_workers"] = run.workers
    if run.epochs is not None:
        chosen["num_train_epochs"] = run.epochs
    if run.adversaries:
        chosen |= {"adversaries": run.adversaries, "adversary": run.adversary}
    processes = 1 if study.virtual else run.workers
    launch = ("-m", "accelerate.commands.launch", "--config_file", study.launch, "--num_processes", str(processes))
    return Cell(
        run.folder,
        study.script,
        study.settings(run.method) | chosen,
        needs=(*NEEDS, "bytes_sent") if study.counts_bytes(run.method) else NEEDS,
        launcher=launch if processes > 1 else (),
        processes=processes,
    )


def usual_rates(study: Study) -> dict[str, float]:
    """The learning rate of each method where none is searched.

    Raises:
        StudyError: a method has a grid alone.
    """
    rates = {label: study.usual_rate(label) for label in study.methods}
    if without := [label for label, rate in rates.items() if rate is None]:
        raise StudyError(
            f"without --tune: {', '.join(without)} has learning_rates and no learning_rate. Give it one, or --tune."
        )
    return {label: rate for label, rate in rates.items() if rate is not None}


def search(study: Study, label: str) -> list[Run]:
    """One run for each learning rate of a method's grid, in their order."""
    if study.tune is None:
        raise StudyError("--tune, and the study has no 'tune': give it a seed, and factors or methods learning_rates.")
    tune = study.tune
    workers = study.workers_of(label)[0] if tune.workers is None else tune.workers
    return [Run(label, workers, tune.seed, rate, tune.epochs) for rate in study.grid(label)]


def ordinary(study: Study, rates: Mapping[str, float]) -> list[Run]:
    """The runs without adversaries of the methods with a learning rate, seed by seed."""
    return [
        Run(label, workers, seed, rates[label])
        for seed in _union(map(study.seeds_of, study.methods))
        for workers in _union(map(study.workers_of, study.methods))
        for label in study.methods
        if label in rates and seed in study.seeds_of(label) and workers in study.workers_of(label)
    ]


def attacked(study: Study, rates: Mapping[str, float]) -> list[Run]:
    """The runs with adversaries, and those without that stand beside them."""
    if study.adversaries is None:
        return []
    wanted = study.adversaries
    return [
        Run(label, wanted.workers, seed, rates[label], adversaries=count, adversary=kind)
        for seed in wanted.seeds or study.seeds[:1]
        for count, kind in [(0, None), *((count, kind) for count in wanted.counts for kind in wanted.kinds)]
        for label in wanted.methods
        if label in rates
    ]


def best(study: Study, rates: Mapping[str, float]) -> list[Run]:
    """Of each method and number of workers the run with the method's first seed: its card is published."""
    return [run for run in ordinary(study, rates) if run.seed == study.seeds_of(run.method)[0]]


def _union(lists: Iterable[list[int]]) -> list[int]:
    return list(dict.fromkeys(item for one in lists for item in one))
