"""What the documents say about `examples/` is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "Makefile",
    *sorted((ROOT / "examples").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.yaml")),
    *sorted((ROOT / "examples").rglob("*.py")),
    *sorted((ROOT / "model_cards").rglob("README.md")),
    *sorted((ROOT / "model_cards").rglob("*.json")),
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_paths_and_modules_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    paths = {path.rstrip(".") for path in re.findall(r"\bexamples/[\w./-]*", text)}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    modules = set(re.findall(r"-m (examples\.[\w.]+\w)", text))
    assert [name for name in sorted(modules) if not _is_module(name)] == []


def _is_module(name: str) -> bool:
    return ROOT.joinpath(*name.split(".")).with_suffix(".py").is_file()


ENTRIES = (
    *("hosts/llamafactory_train.py", "hosts/sentence_transformers_train.py", "hosts/lightning_fit.py"),
    *("studies/run.py", "benchmarks/network.py", "benchmarks/step.py", "benchmarks/checks.py"),
    *("benchmarks/orthogonal.py", "benchmarks/shards.py", "benchmarks/gpu.py"),
)


def test_the_readme_has_a_row_for_each_script() -> None:
    text = (ROOT / "examples" / "README.md").read_text()
    rows = re.findall(r"^\| `([\w./]+)` \|", text, re.MULTILINE)
    scripts = [path.name for path in (ROOT / "examples").glob("*.py")]
    assert sorted(rows) == sorted([*scripts, *ENTRIES])
