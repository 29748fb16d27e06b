"""What README and the pages say: links, paths, options, names, errors and commands are there, and the commands run.

Short commands run as they stand. Of long ones, everything is parsed by what would get it: `accelerate launch`,
`torchrun` and the script; `tests/examples/` and `tests/hosts/` run these scripts with little data.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser as torchrun_parser
from transformers.training_args import OptimizerNames

from hf_dlion.trainer.methods import METHODS

pytest.importorskip("transformers", minversion="5.16", reason="the examples, whose options are read, need it")

ROOT = Path(__file__).parents[1]
TEXTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "examples/README.md", "model_cards/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
MARKDOWN = [
    *TEXTS,
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / ".github").rglob("*.md")),
    *sorted((ROOT / "model_cards").glob("*/**/README.md")),
]
PACKAGE = sorted((ROOT / "hf_dlion").rglob("*.py"))
NAME = {"ids": lambda path: str(path.relative_to(ROOT))}

# A script of the reader's own takes what the Trainer's arguments are.
SCRIPTS = {"your_script.py": "minimal_trainer"}
# Their parsers are those of programs that are not installed here.
FOREIGN = ("examples/hosts/",)


# Links


@pytest.mark.parametrize("document", MARKDOWN, **NAME)
def test_links_lead_somewhere(document: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(document.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


@functools.cache
def anchors(file: Path) -> set[str]:
    """As GitHub and mkdocs both name the headings."""
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PICTURES = {
    "update_4_workers.png": "network/4_workers/step_time.png",
    "whole_step_2_workers.png": "whole_step/2_workers_2048_tokens/step_time.png",
}


def test_pictures_are_those_of_the_runs() -> None:  # copies, as a site of docs/ has nothing from outside of it
    assert {path.name for path in (ROOT / "docs/pictures").iterdir()} == set(PICTURES)
    for name, run in PICTURES.items():
        assert (ROOT / "docs/pictures" / name).read_bytes() == (ROOT / "model_cards" / run).read_bytes()


# Paths, options, names, errors


@pytest.mark.parametrize("document", TEXTS, **NAME)
def test_paths_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.])(?:hf_dlion|examples|tests|docs|model_cards)/[\w./*-]*\w", text)
    assert [path for path in sorted(set(named)) if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("document", TEXTS, **NAME)
def test_options_and_optimizers_exist(document: Path) -> None:
    text = re.sub(r"^```diff.*?^```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    given = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))
    assert sorted(given - known_options()) == []
    names = re.findall(
        r"\boptim(?:=|: )\"?(\w+)|--optim (\w+)|^optimizer: (\w+)|`((?:dlion|dsignum|dmuon)_\w+)`", text, re.M
    )
    known = {*METHODS, *(member.value for member in OptimizerNames)}
    assert [name for found in names for name in found if name and name not in known] == []


@functools.cache
def known_options() -> set[str]:
    no_parser, elastic = "minimal_loop", "elastic_loop"  # this one needs torchft, which not all environments have
    names = [path.stem for path in (ROOT / "examples").glob("*.py") if path.stem not in (no_parser, elastic)]
    names += [
        "examples.studies.run",
        "examples.benchmarks.network",
        "examples.benchmarks.checks",
        "examples.benchmarks.orthogonal",
        "examples.benchmarks.step",
        "hf_dlion.plan",
    ]
    parsers = [*map(parser_of, names), launch_command_parser(), torchrun_parser()]
    text = (ROOT / "examples" / f"{elastic}.py").read_text(encoding="utf-8")
    own = re.findall(r"add_argument\(\s*\"(--\w+)\"", text)
    lighthouse = ["--min_replicas", "--join_timeout_ms", "--heartbeat_timeout_ms"]
    return {*own, *lighthouse, *(option for parser in parsers for option in parser._option_string_actions)}


def test_errors_are_those_of_the_package() -> None:
    text = (ROOT / "docs/failures.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    assert len(quoted) > 15
    said = [
        node.value
        for path in PACKAGE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [part for part in quoted if not any(part in message for message in said)] == []


@pytest.mark.parametrize("document", TEXTS, **NAME)
def test_code_imports_what_there_is(document: Path) -> None:
    for code in re.findall(r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_dlion"):
                module = importlib.import_module(node.module or "")
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 140


# Commands


def commands(document: Path) -> Iterator[list[str]]:
    """The words of each, without what only sets the stage."""
    text = document.read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`((?:accelerate|torchrun|python|make|sudo|hf_dlion|\.venv/bin)(?: |/)[^`\n]*)`", text)
    rows = [span for span in spans if re.match(r"(make|hf_dlion) |(?!hf_dlion).*(\.py| -m )", span)]
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    for line in [*lines, *rows]:
        for part in line.split("&&"):
            words = shlex.split(part, comments=True)
            if words[:1] == ["sudo"]:
                words = words[1:]
            if words and words[0] not in ("cd", "git", "export"):
                yield words


EVERY = [(document, words) for document in TEXTS for words in commands(document)]


@pytest.mark.parametrize("words", sorted({tuple(words) for _, words in EVERY}), ids=lambda words: " ".join(words)[:90])
def test_commands_are_understood(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    program, *rest = words
    check = {
        "make": check_make,
        "pip": check_pip,
        ".venv/bin/pip": check_pip,
        "python": check_python,
        ".venv/bin/python": check_python,
        "accelerate": lambda given: check_launch(given[1:], launch_command_parser()),
        "torchrun": lambda given: check_launch(given, torchrun_parser()),
        "hf_dlion": check_own,
        "axolotl": lambda given: None,  # tests/hosts/test_axolotl.py
        "torchft_lighthouse": lambda given: None,  # tests/faults/test_elastic.py
    }
    check[program](rest)


def check_make(targets: list[str]) -> None:
    done = subprocess.run(["make", "-n", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_pip(given: list[str]) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", text.partition("[project.optional-dependencies]")[2], re.MULTILINE))
    assert given[0] == "install"
    wanted = re.findall(r"\[([\w,]+)\]", " ".join(given))
    assert {extra for group in wanted for extra in group.split(",")} <= extras


def check_python(given: list[str]) -> None:
    if given[:2] == ["-m", "pytest"]:
        assert all((ROOT / path).exists() for path in given[2:] if "/" in path)
        return
    script, arguments = (given[1], given[2:]) if given[0] == "-m" else (given[0], given[1:])
    check_script(script, arguments)


def check_launch(given: list[str], parser: argparse.ArgumentParser) -> None:
    known = parser.parse_args(given)
    if getattr(known, "config_file", None):
        assert Path(known.config_file).is_file()
    check_script(known.training_script, known.training_script_args)


def check_script(script: str, arguments: list[str]) -> None:
    if "elastic" in script:
        pytest.importorskip("torchft", reason="torchft, which this example needs, is not installed")
    if script.startswith(FOREIGN) or script == "examples/minimal_loop.py":
        assert Path(script).is_file()
        return
    name = SCRIPTS.get(script, script.removeprefix("examples/").removesuffix(".py"))
    _, unknown = parser_of(name, *arguments).parse_known_args(arguments)
    assert unknown == []


def check_own(given: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", "hf_dlion", *given], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    if given[0] == "plan":
        assert re.search(r"^Take \w+: ", run.stdout, re.MULTILINE)
        return
    assert re.search(r"^- torch: \d", run.stdout, re.MULTILINE)
    assert re.search(r"^- backends: .*gloo", run.stdout, re.MULTILINE)
    assert "- accelerate's configuration: " in run.stdout


class Found(BaseException):
    """The parser that a script would parse its command line by."""


def parser_of(name: str, *arguments: str) -> argparse.ArgumentParser:
    """Of a script in `examples/`, with the defaults of its recipe, if the arguments name one."""
    real: Callable[..., Any] = argparse.ArgumentParser.parse_known_args

    def stop(self: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        if args not in (None, list(arguments)) or not self.add_help:  # it only looks for defaults
            return real(self, args, namespace)
        raise Found(self)

    argv = sys.argv
    argparse.ArgumentParser.parse_known_args, sys.argv = stop, [name, *arguments]  # type: ignore[method-assign]
    try:
        importlib.import_module(name).main()
    except Found as found:
        return found.args[0]
    finally:
        argparse.ArgumentParser.parse_known_args, sys.argv = real, argv  # type: ignore[method-assign]
    raise AssertionError(f"{name} has parsed nothing")


def test_the_quickstart_prints_what_the_readme_says(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    command = next(words for words in commands(ROOT / "README.md") if "examples/minimal_trainer.py" in words)
    shown = re.search(r"^```\n(\{'loss'.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert shown is not None
    launch = [sys.executable, "-m", "accelerate.commands.launch", *command[2:], "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    for entry, close in (
        ("loss", 0.1),
        ("bits_sent_per_param", 0.01),
        ("fp32_allreduce_ratio", 0.01),
        ("vote_ties", 0.1),
    ):
        promised, printed = (numbers(entry, said) for said in (shown[1], done.stdout))
        assert printed == pytest.approx(promised, rel=close)
    assert numbers("validation loss", done.stdout) == pytest.approx(numbers("validation loss", shown[1]), abs=0.05)


def numbers(name: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(rf"(?:'{name}':|\b{name}) '?([\d.]+)", text)]
