"""A study of methods, from its YAML file: which cells it has, in which order, and at which learning rates."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from study_cells import Cell, StudyError

from hf_dlion.trainer.methods import METHODS

NEEDS = ("log_history", "trainable_parameters", "bytes_counted_steps", "bytes_sent")

# The paper's for CIFAR-10 (arXiv 2404.00438); Signum takes Lion's.
_LION = {"learning_rate": 5e-5, "weight_decay": 5e-3}
PAPER: dict[str, dict[str, float]] = {
    **dict.fromkeys(("dlion_mavo", "dlion_avg", "dsignum_mavo", "dsignum_avg", "glion"), _LION),
    "gadamw": {"learning_rate": 1e-4, "weight_decay": 5e-4},
    "terngrad": {"learning_rate": 1e-3, "weight_decay": 5e-4},
    "graddrop": {"learning_rate": 1e-3, "weight_decay": 5e-4, "drop_share": 0.96},
    "dgc": {"learning_rate": 1e-2, "weight_decay": 5e-4, "drop_share": 0.96},
}
KINDS = ("flip", "random")
_CHOSEN_HERE = ("virtual_workers", "seed", "adversaries", "adversary", "output_dir")


@dataclass(frozen=True)
class Tune:
    """The search: as many learning rates for every method, each its usual rate times one of the factors."""

    factors: list[float]
    workers: int
    seed: int
    epochs: float | None = None  # those of the study


@dataclass(frozen=True)
class Adversaries:
    """Which methods are run with adversaries among the workers, how many, and of which kinds."""

    methods: list[str]
    workers: int
    counts: list[int]
    kinds: list[str]
    seeds: list[int] | None = None  # the study's first


@dataclass(frozen=True)
class Run:
    """A cell by what it is about."""

    method: str
    workers: int
    seed: int
    learning_rate: float
    epochs: float | None = None  # of a search, where they differ from the study's
    adversaries: int = 0
    adversary: str | None = None

    @property
    def folder(self) -> str:
        parts = [_slug(self.method)]
        if self.epochs is not None:
            parts.append(f"search_{self.epochs:g}_epochs")
        parts.append(f"workers_{self.workers}")
        if self.adversaries:
            parts.append(f"{self.adversary}_{self.adversaries}")
        return "/".join([*parts, f"lr_{self.learning_rate:g}", f"seed_{self.seed}"])


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        script: with the arguments of `train_vit.py`, leaving `results.json` as that does.
        arguments: for all runs.
        workers: numbers of them to compare at.
        seeds: of a method that has none of its own.
        methods: by label, each with its arguments; `optim` is the label if not given, `seeds` the study's, learning
            rate and weight decay the paper's if they are not given for all either.
        findings: plain words for the top of the page.
    """

    title: str
    script: str
    arguments: dict[str, Any]
    workers: list[int]
    seeds: list[int]
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in METHODS})
    adversaries: Adversaries | None = None
    tune: Tune | None = None
    note: str = ""
    findings: str = ""

    @classmethod
    def read(cls, path: Path) -> "Study":
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise StudyError(f"{path}: cannot be read as YAML ({error}).") from error
        try:
            given = _checked(cls, given, "the study")
            if "methods" in given:
                named = _mapping(given["methods"], "methods")
                given["methods"] = {label: _mapping(own or {}, f"methods: {label}") for label, own in named.items()}
            for name, kind in (("adversaries", Adversaries), ("tune", Tune)):
                if given.get(name) is not None:
                    given[name] = kind(**_checked(kind, given[name], name))
            given["findings"] = _text(given.get("findings", ""), path.parent)
            study = cls(**given)
            study.check()
        except StudyError as error:
            raise StudyError(f"{path}: {error} See examples/configs/studies/cifar10_vit.yaml.") from None
        return study

    def check(self) -> None:
        if not Path(self.script).is_file():
            raise StudyError(f"script: there is no {self.script}; its path is from where the command is run.")
        _check_counts("workers", self.workers, least=1)
        _check_counts("seeds", self.seeds)
        _mapping(self.arguments, "arguments")
        for where, arguments in {"arguments": self.arguments, **self.methods}.items():
            if taken := [key for key in _CHOSEN_HERE if key in arguments]:
                raise StudyError(
                    f"{where}: {', '.join(taken)} cannot stand there, since the study sets it cell by cell."
                )
        for label, own in self.methods.items():
            if self.optim(label) not in METHODS:
                raise StudyError(
                    f"methods: {label!r} has optim={self.optim(label)!r}, which is not one of {', '.join(METHODS)}."
                )
            _check_counts(f"methods: {label}: seeds", own.get("seeds", self.seeds))
            self.usual_rate(label)
        if len({_slug(label) for label in self.methods}) < len(self.methods):
            raise StudyError(f"methods: {', '.join(self.methods)} would share a folder; name them more differently.")
        if self.adversaries is not None:
            self._check_adversaries(self.adversaries)
        if self.tune is not None:
            factors = self.tune.factors
            _check_counts("tune: workers, seed", [self.tune.workers, self.tune.seed])
            if self.tune.epochs is not None and not _is_positive(self.tune.epochs):
                raise StudyError(f"tune: epochs={self.tune.epochs!r} is not a number above 0.")
            if not isinstance(factors, list) or len(set(factors)) < 2 or not all(_is_positive(f) for f in factors):
                raise StudyError(
                    f"tune: factors={factors} is not a search; give at least two different numbers above 0."
                )

    def _check_adversaries(self, adversaries: Adversaries) -> None:
        if unknown := [label for label in adversaries.methods if label not in self.methods]:
            raise StudyError(f"adversaries: {', '.join(unknown)} is not among the methods {', '.join(self.methods)}.")
        _check_counts("adversaries: counts", adversaries.counts, least=1)
        _check_counts("adversaries: seeds", adversaries.seeds or self.seeds)
        if not adversaries.kinds or not set(adversaries.kinds) <= set(KINDS):
            raise StudyError(f"adversaries: kinds={adversaries.kinds!r} is not some of {', '.join(KINDS)}.")
        if most := [count for count in adversaries.counts if count > adversaries.workers]:
            raise StudyError(
                f"adversaries: counts has {most[0]}, and there are {adversaries.workers} workers; give at most so many."
            )

    def optim(self, label: str) -> str:
        return str(self.methods[label].get("optim", label))

    def settings(self, label: str) -> dict[str, Any]:
        """The arguments of a method: the paper's, but for what the study gives for all, or for it."""
        own = {key: value for key, value in self.methods[label].items() if key != "seeds"}
        return PAPER[self.optim(label)] | self.arguments | {"optim": self.optim(label)} | own

    def usual_rate(self, label: str) -> float:
        rate = _number(self.settings(label)["learning_rate"])
        if rate is None or rate <= 0:
            found = self.settings(label)["learning_rate"]
            raise StudyError(f"methods: {label}: learning_rate={found!r} is not a number above 0.")
        return rate

    def cell(self, run: Run) -> Cell:
        chosen: dict[str, Any] = {"learning_rate": run.learning_rate, "virtual_workers": run.workers, "seed": run.seed}
        if run.epochs is not None:
            chosen["num_train_epochs"] = run.epochs
        if run.adversaries:
            chosen |= {"adversaries": run.adversaries, "adversary": run.adversary}
        return Cell(run.folder, self.script, self.settings(run.method) | chosen, NEEDS)

    def search(self, label: str) -> list[Run]:
        """One run for each learning rate of the search, in their order."""
        if self.tune is None:
            raise StudyError("--tune, and the study has no 'tune': give it factors, workers and a seed.")
        rates = [float(f"{self.usual_rate(label) * factor:.6g}") for factor in sorted(set(self.tune.factors))]
        return [Run(label, self.tune.workers, self.tune.seed, rate, self.tune.epochs) for rate in rates]

    def ordinary(self, rates: Mapping[str, float]) -> list[Run]:
        """The runs without adversaries of the methods with a learning rate, seed by seed."""
        return [
            Run(label, workers, seed, rates[label])
            for seed in _union(self.methods[label].get("seeds", self.seeds) for label in self.methods)
            for workers in self.workers
            for label in self.methods
            if label in rates and seed in self.methods[label].get("seeds", self.seeds)
        ]

    def attacked(self, rates: Mapping[str, float]) -> list[Run]:
        """The runs with adversaries, and those without that stand beside them."""
        if self.adversaries is None:
            return []
        wanted = self.adversaries
        return [
            Run(label, wanted.workers, seed, rates[label], adversaries=count, adversary=kind)
            for seed in wanted.seeds or self.seeds[:1]
            for count, kind in [(0, None), *((count, kind) for count in wanted.counts for kind in wanted.kinds)]
            for label in wanted.methods
            if label in rates
        ]


def _slug(label: str) -> str:
    return re.sub("[^a-z0-9_]+", "_", label.lower())


def _mapping(given: Any, name: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise StudyError(f"{name} is a {type(given).__name__}; it must be lines of 'name: value'.")
    return dict(given)


def _union(lists: Iterator[list[int]]) -> list[int]:
    return list(dict.fromkeys(item for one in lists for item in one))


def _checked(kind: type, given: Any, name: str) -> dict[str, Any]:
    known = {entry.name: entry for entry in fields(kind)}
    given = _mapping(given, name)
    if unknown := [str(key) for key in given if key not in known]:
        raise StudyError(f"{name} has {', '.join(unknown)}, which is not known; it takes {', '.join(known)}.")
    needed = [key for key, entry in known.items() if entry.default is MISSING and entry.default_factory is MISSING]
    if missing := [key for key in needed if key not in given]:
        raise StudyError(f"{name} lacks {', '.join(missing)}.")
    return given


def _check_counts(name: str, values: Any, least: int = 0) -> None:
    if not isinstance(values, list) or not values or not all(type(value) is int and value >= least for value in values):
        raise StudyError(f"{name}={values!r} is not a list of numbers from {least} on; write [1, 2], say.")


def _number(value: Any) -> float | None:
    """YAML takes 1e-4 for text."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _is_positive(value: Any) -> bool:
    return (_number(value) or 0) > 0


def _text(given: str, folder: Path) -> str:
    """A text, or what is in the Markdown file of that name."""
    if not given.strip().endswith(".md"):
        return given
    try:
        return (folder / given.strip()).read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(
            f"findings: {given} cannot be read ({error}). Give a file beside the study, or the text."
        ) from error
