"""What of a study's folder is copied to be published: no weights, and no checkpoints."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from . import runs
from .scores import CARD, FOLDER, folder_of, label_of
from .study import Study, slug


def publish(study: Study, rates: Mapping[str, float], root: Path, target: Path) -> None:
    """Copies the page with its numbers and pictures, the scores, and each best run's model card, where it has one."""
    _copy(root, target, "README.md", "summary.json", "*.png")
    _copy(root / FOLDER, target, "*shot.md")
    for run in runs.best(study, rates):
        own, label = target / label_of(study, run), label_of(study, run)
        if (root / run.folder / CARD).is_file():
            _copy(root / run.folder, own, CARD, "*.png", "results.json")
        _copy_scores(study, label, root, own)
    for label in study.evaluation.models if study.evaluation else ():
        _copy_scores(study, slug(label), root, target / slug(label))


def _copy_scores(study: Study, label: str, root: Path, target: Path) -> None:
    for shots in study.evaluation.num_fewshot if study.evaluation else ():
        _copy(root / folder_of(label, shots), target, f"{shots}shot.json")


def _copy(source: Path, target: Path, *patterns: str) -> None:
    for path in sorted(path for pattern in patterns for path in source.glob(pattern)):
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.name)
