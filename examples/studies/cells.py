"""Cells of a study: runs of scripts in folders of their own, several at a time, of which none is run twice."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

LOG, STAMP = "log.txt", "cell.json"
_POLL_SECONDS, _PATIENCE_SECONDS = 0.1, 10.0


class StudyError(ValueError):
    """A study that cannot be run; the message says what was given, why not, and what to do instead."""


@dataclass(frozen=True)
class Cell:
    """One run of a script.

    Attributes:
        folder: where it is kept, below the root of the study.
        script: leaves its results in its `--output_dir`.
        arguments: of the script, but for `output_dir`.
        needs: what the results must have.
        launcher: arguments of Python before the script.
        processes: how many of them share the cores.
        results: file name of the results, JSON.
        inputs: what it reads that another cell left, by a hash: it is run again when that changed.
    """

    folder: str
    script: str
    arguments: Mapping[str, Any]
    needs: tuple[str, ...]
    launcher: tuple[str, ...] = ()
    processes: int = 1
    results: str = "results.json"
    inputs: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """The command, but for Python and the output folder."""
        given = [_option(key, value) for key, value in self.arguments.items() if value is not None]
        return [*self.launcher, self.script, *(word for option in given for word in option)]

    @property
    def stamp(self) -> list[str]:
        """What it depends on, in order of the alphabet: two cells with the same are the same run."""
        return sorted([*self.words, *self.inputs])

    def command(self, root: Path) -> list[str]:
        return [sys.executable, *self.words, f"--output_dir={root / self.folder}"]


def _option(key: str, value: Any) -> list[str]:
    return [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]


@dataclass
class _Running:
    cell: Cell
    process: subprocess.Popen[bytes]
    log: IO[bytes]
    since: float = field(default_factory=time.monotonic)


def results_of(cell: Cell, root: Path) -> dict[str, Any] | None:
    """What a finished cell left; None if it did not end well, is broken, or was run with another command."""
    stamp = _read_json(root / cell.folder / STAMP)
    if stamp is None or sorted(stamp.get("command", [])) != cell.stamp:
        return None
    return _whole_results(cell, root)


def run_cells(cells: Sequence[Cell], root: Path, jobs: int = 1) -> dict[str, str]:
    """Runs the cells that are not finished, in their order, `jobs` at a time.

    Each has its share of the cores, unless OMP_NUM_THREADS says how many threads: two studies at once with two threads
    each take several times as long on two cores. A cell counts as finished from when its script has ended well. SIGINT,
    SIGTERM and SIGHUP stop the scripts that run, with their children, and raise KeyboardInterrupt.

    Returns:
        Of the cells that failed, by folder, what happened and where their output is.
    """
    waiting = [cell for cell in cells if results_of(cell, root) is None]
    total, running, failures = len(waiting), list[_Running](), dict[str, str]()
    with _told_to_stop() as stopped:
        try:
            while (waiting or running) and not stopped:
                while waiting and len(running) < jobs and not stopped:
                    cell = waiting.pop(0)
                    running.append(_start(cell, root, jobs, f"{total - len(waiting)} of {total}"))
                time.sleep(_POLL_SECONDS)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    if failure := _end(one, root):
                        failures[one.cell.folder] = failure
        finally:
            _stop(running)
        if stopped:
            raise KeyboardInterrupt
    return failures


def _start(cell: Cell, root: Path, jobs: int, count: str) -> _Running:
    folder = root / cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    if why := _why_again(cell, root):
        print(f"{cell.folder}: {why}", flush=True)
    for name in (STAMP, cell.results):
        (folder / name).unlink(missing_ok=True)
    print(f"running {cell.folder} ({count})", flush=True)
    threads = max(1, (os.cpu_count() or 1) // (jobs * cell.processes))
    log = (folder / LOG).open("wb")
    process = subprocess.Popen(
        cell.command(root),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={"OMP_NUM_THREADS": str(threads)} | os.environ,
        start_new_session=True,  # so that Ctrl-C comes here alone, and the script can be stopped with its children
    )
    return _Running(cell, process, log)


def _end(one: _Running, root: Path) -> str | None:
    """Stamps a cell that ended well; else, what happened."""
    one.log.close()
    folder = root / one.cell.folder
    if one.process.returncode:
        failure = f"ended with exit code {one.process.returncode}; its output is in {folder / LOG}."
    elif _whole_results(one.cell, root) is None:
        needed = ", ".join(one.cell.needs)
        failure = f"ended well, but left no {one.cell.results} with {needed}; its output is in {folder / LOG}."
    else:
        part = folder / f"{STAMP}.part"
        part.write_text(json.dumps({"command": [*one.cell.words, *one.cell.inputs]}, indent=1) + "\n", encoding="utf-8")
        part.replace(folder / STAMP)
        print(f"done: {one.cell.folder}, {time.monotonic() - one.since:.0f} s", flush=True)
        return None
    print(f"failed: {one.cell.folder} {failure}", flush=True)
    return failure


def _why_again(cell: Cell, root: Path) -> str | None:
    """Why a cell that has something in its folder is run again."""
    folder = root / cell.folder
    if not (folder / cell.results).exists():
        return None
    stamp = _read_json(folder / STAMP)
    if stamp is None:
        return "run again, since it has results but did not end well"
    before, now = set(stamp.get("command", [])), set(cell.stamp)
    if before != now:
        return f"run again, since its command changed: {_listed(before - now)} before, {_listed(now - before)} now"
    return f"run again, since its {cell.results} is broken"


def _listed(words: set[str]) -> str:
    return shlex.join(sorted(words)) or "nothing more"


def _whole_results(cell: Cell, root: Path) -> dict[str, Any] | None:
    results = _read_json(root / cell.folder / cell.results)
    return results if results is not None and all(results.get(key) is not None for key in cell.needs) else None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def _told_to_stop() -> Iterator[list[int]]:
    """A list in which the signals to stop arrive: an exception at any line could lose a script just started."""
    arrived: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(number)

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in signals}
    try:
        yield arrived
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(running: Sequence[_Running]) -> None:
    for one in running:
        _signal_group(one, signal.SIGTERM)
    until = time.monotonic() + _PATIENCE_SECONDS
    while any(one.process.poll() is None for one in running) and time.monotonic() < until:
        time.sleep(_POLL_SECONDS)
    for one in running:
        _signal_group(one, signal.SIGKILL)
        one.process.wait()
        one.log.close()


def _signal_group(one: _Running, number: int) -> None:
    try:
        os.killpg(one.process.pid, number)
    except ProcessLookupError:
        return
