"""A study as its YAML file has it: what is compared, on what, and at which learning rates."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hf_dlion.trainer.methods import METHODS

from .cells import StudyError
from .measures import MEASURES
from .paper import PAPER
from .reading import (
    check_counts,
    check_file,
    check_rates,
    fields_of,
    is_positive,
    mapping,
    number,
    text_or_file,
)

KINDS = ("flip", "random")
OWN = ("seeds", "workers", "learning_rates")  # of a method, and no arguments of the script
SET_BY_THE_STUDY = ("virtual_workers", "seed", "adversaries", "adversary", "output_dir")


@dataclass(frozen=True)
class Tune:
    """The search, with as many learning rates for every method.

    Attributes:
        seed: of all runs of the search.
        factors: times a method's usual learning rate; not of a method with `learning_rates` of its own.
        workers: of all runs of the search; None is a method's own number, if it has one only.
        epochs: of a run of the search; None is those of the study.
    """

    seed: int
    factors: list[float] | None = None
    workers: int | None = None
    epochs: float | None = None


@dataclass(frozen=True)
class Adversaries:
    """Which methods are run with adversaries among the virtual workers, how many, and of which kinds."""

    methods: list[str]
    workers: int
    counts: list[int]
    kinds: list[str]
    seeds: list[int] | None = None  # the study's first


@dataclass(frozen=True)
class Evaluation:
    """What the best run of each method is scored on, when all runs have ended.

    Attributes:
        arguments: of the script, but for the model, the shots and the output folder.
        num_fewshot: one evaluation for each.
        models: more to score, by label: the model before training, say.
        script: with the arguments of `evaluate_3shot.py`.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    num_fewshot: list[int] = field(default_factory=lambda: [3])
    models: dict[str, str] = field(default_factory=dict)
    script: str = "examples/evaluate_3shot.py"


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        script: one of the task scripts, or another with their arguments that leaves `results.json` as they do.
        arguments: for all runs.
        seeds: of a method that has none of its own.
        methods: by label, each with its arguments; `optim` is the label if not given, learning rate and weight decay
            the paper's if they are not given for all either. `seeds`, `workers` (a number or several) and
            `learning_rates` (its grid of the search) are a method's own.
        workers: numbers of them to compare at; of a method that has none of its own.
        virtual: whether the workers of a run take turns in one process, or are a process each.
        launch: configuration of `accelerate launch`, where they are processes.
        measure: what methods are compared by, `loss` or `accuracy`.
        findings: plain words for the top of the page, or the Markdown file with them.
    """

    title: str
    script: str
    arguments: dict[str, Any]
    seeds: list[int]
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in METHODS})
    workers: list[int] = field(default_factory=list)
    virtual: bool = False
    launch: str = "examples/launch/cpu_2.yaml"
    measure: str = "loss"
    tune: Tune | None = None
    adversaries: Adversaries | None = None
    evaluation: Evaluation | None = None
    note: str = ""
    findings: str = ""

    @classmethod
    def read(cls, path: Path) -> "Study":
        """The study in a YAML file.

        Raises:
            StudyError: it cannot be read, has a key that is not known, or cannot be run.
        """
        try:
            given = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise StudyError(f"{path}: cannot be read as YAML ({error}).") from error
        try:
            given = fields_of(cls, given, "the study")
            if "methods" in given:
                named = mapping(given["methods"], "methods")
                given["methods"] = {label: mapping(own or {}, f"methods: {label}") for label, own in named.items()}
            for name, kind in (("tune", Tune), ("adversaries", Adversaries), ("evaluation", Evaluation)):
                if given.get(name) is not None:
                    given[name] = kind(**fields_of(kind, given[name], name))
            given["findings"] = text_or_file("findings", given.get("findings", ""), path.parent)
            study = cls(**given)
            study.check()
        except StudyError as error:
            raise StudyError(f"{path}: {error} See examples/studies/cifar10_vit.yaml.") from None
        return study

    def check(self) -> None:
        check_file("script", self.script)
        if self.measure not in MEASURES:
            raise StudyError(f"measure={self.measure!r} is not one of {', '.join(MEASURES)}.")
        if type(self.virtual) is not bool:
            raise StudyError(f"virtual={self.virtual!r} is neither true nor false.")
        if not self.virtual:
            check_file("launch", self.launch)
        if self.workers != []:
            check_counts("workers", self.workers, least=1)
        check_counts("seeds", self.seeds)
        mapping(self.arguments, "arguments")
        for where, arguments in {"arguments": self.arguments, **self.methods}.items():
            if taken := [key for key in SET_BY_THE_STUDY if key in arguments]:
                raise StudyError(
                    f"{where}: {', '.join(taken)} cannot stand there, since the study sets it cell by cell."
                )
        for label in self.methods:
            self._check_method(label)
        if len({slug(label) for label in self.methods}) < len(self.methods):
            raise StudyError(f"methods: {', '.join(self.methods)} would share a folder; name them more differently.")
        if self.adversaries is not None:
            self._check_adversaries(self.adversaries)
        if self.tune is not None:
            self._check_tune(self.tune)
        if self.evaluation is not None:
            check_file("evaluation: script", self.evaluation.script)
            check_counts("evaluation: num_fewshot", self.evaluation.num_fewshot)
            mapping(self.evaluation.arguments, "evaluation: arguments")
            mapping(self.evaluation.models, "evaluation: models")

    def _check_method(self, label: str) -> None:
        optim = self.optim(label)
        alone = self.virtual and not self._exchanges_anyway(label)
        if optim not in METHODS and (alone or not is_of_transformers(optim)):
            known = ", ".join(METHODS) + ("" if alone else ", nor a name of transformers")
            raise StudyError(f"methods: {label!r} has optim={optim!r}, which is not one of {known}.")
        check_counts(f"methods: {label}: seeds", self.seeds_of(label))
        if self.workers_of(label) == []:
            raise StudyError(f"methods: {label} has no workers; write workers: [2, 4] there, or for the whole study.")
        check_counts(f"methods: {label}: workers", self.workers_of(label), least=1)
        if "learning_rates" in self.methods[label]:
            check_rates(f"methods: {label}: learning_rates", self.methods[label]["learning_rates"])
        elif self.usual_rate(label) is None:
            raise StudyError(
                f"methods: {label} has no learning rate, and the paper has none for {optim}; give it learning_rate, or "
                "learning_rates to search."
            )
        if "weight_decay" not in self.settings(label):
            raise StudyError(f"methods: {label} has no weight_decay, and the paper has none for {optim}; give it one.")

    def _check_tune(self, tune: Tune) -> None:
        check_counts("tune: seed", [tune.seed])
        if tune.workers is not None:
            check_counts("tune: workers", [tune.workers], least=1)
        elif several := [label for label in self.methods if len(self.workers_of(label)) > 1]:
            raise StudyError(f"tune lacks workers; {', '.join(several)} would be searched at several numbers of them.")
        if tune.epochs is not None and not is_positive(tune.epochs):
            raise StudyError(f"tune: epochs={tune.epochs!r} is not a number above 0.")
        without = [label for label, own in self.methods.items() if "learning_rates" not in own]
        if tune.factors is not None:
            check_rates("tune: factors", tune.factors)
        elif without:
            raise StudyError(f"tune lacks factors; {', '.join(without)} has no learning_rates either.")
        budgets = {label: len(self.grid(label)) for label in self.methods}
        if len(set(budgets.values())) > 1:
            given = ", ".join(f"{label} {count}" for label, count in budgets.items())
            raise StudyError(f"tune: the methods have different numbers of learning rates ({given}); give all as many.")

    def _check_adversaries(self, adversaries: Adversaries) -> None:
        if not self.virtual:
            raise StudyError("adversaries: they are among virtual workers only; write virtual: true.")
        if unknown := [label for label in adversaries.methods if label not in self.methods]:
            raise StudyError(f"adversaries: {', '.join(unknown)} is not among the methods {', '.join(self.methods)}.")
        check_counts("adversaries: counts", adversaries.counts, least=1)
        check_counts("adversaries: seeds", adversaries.seeds or self.seeds)
        if not adversaries.kinds or not set(adversaries.kinds) <= set(KINDS):
            raise StudyError(f"adversaries: kinds={adversaries.kinds!r} is not some of {', '.join(KINDS)}.")
        if most := [count for count in adversaries.counts if count > adversaries.workers]:
            raise StudyError(
                f"adversaries: counts has {most[0]}, and there are {adversaries.workers} workers; give at most so many."
            )

    def optim(self, label: str) -> str:
        return str(self.methods[label].get("optim", label))

    def counts_bytes(self, label: str) -> bool:
        """Whether a run of it says what a worker sent, as those of this package's optimizers do."""
        return self.optim(label) in METHODS or self._exchanges_anyway(label)

    def _exchanges_anyway(self, label: str) -> bool:
        """Whether the workers exchange votes whatever the optimizer."""
        settings = self.settings(label)
        return bool(settings.get("local_steps") or settings.get("gradient_votes"))

    def seeds_of(self, label: str) -> list[int]:
        seeds: list[int] = self.methods[label].get("seeds", self.seeds)
        return seeds

    def workers_of(self, label: str) -> list[int]:
        workers = self.methods[label].get("workers", self.workers)
        return [workers] if isinstance(workers, int) else workers

    def settings(self, label: str) -> dict[str, Any]:
        """The arguments of a method: the paper's, but for what the study gives for all, or for it."""
        own = {key: value for key, value in self.methods[label].items() if key not in OWN}
        return PAPER.get(self.optim(label), {}) | self.arguments | {"optim": self.optim(label)} | own

    def usual_rate(self, label: str) -> float | None:
        """The learning rate where none is searched; None of a method that has a grid of its own instead."""
        own = self.methods[label]
        given = {**self.arguments, **own} if "learning_rates" in own else self.settings(label)
        if "learning_rate" not in given:
            return None
        if not is_positive(given["learning_rate"]):
            raise StudyError(f"methods: {label}: learning_rate={given['learning_rate']!r} is not a number above 0.")
        return number(given["learning_rate"])

    def grid(self, label: str) -> list[float]:
        """The learning rates of a method's search, from small to large."""
        if "learning_rates" in self.methods[label]:
            return sorted({float(rate) for rate in self.methods[label]["learning_rates"]})
        usual = self.usual_rate(label)
        if self.tune is None or self.tune.factors is None or usual is None:
            raise StudyError(f"methods: {label} has nothing to search; give it learning_rates, or the study 'tune'.")
        return [float(f"{usual * factor:.6g}") for factor in sorted(set(self.tune.factors))]


def is_of_transformers(optim: str) -> bool:
    from transformers.training_args import OptimizerNames  # takes seconds, and few studies need it

    return optim in [str(name.value) for name in OptimizerNames]


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub("[^a-z0-9_]+", "_", label.lower())
