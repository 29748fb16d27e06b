"""The parent's side of the workers of `network.py`: it starts them, asks them for steps, and ends them."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from .links import BenchmarkError

TURNS = 3


def say(text: str) -> None:
    """Progress goes to stderr; stdout has the table alone."""
    print(text, file=sys.stderr, flush=True)


class Workers:
    """The parent's side of the worker processes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.channels: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, prefixes: list[list[str]]) -> None:
        """Start a worker behind each of these commands."""
        interface = self.options.interface or ("lo" if sys.platform == "linux" else "lo0")
        environment = os.environ | {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
        for rank, prefix in enumerate(prefixes):
            channel, theirs = Pipe()
            fd = theirs.fileno()
            command = [*prefix, sys.executable, "-m", f"{__package__}.worker", str(rank), str(fd)]
            # In a session of their own, Ctrl-C does not reach them: the parent ends them, and says so once.
            process = subprocess.Popen(command, pass_fds=[fd], env=environment, start_new_session=True)
            theirs.close()
            self.processes.append(process)
            self.channels.append(channel)
            channel.send(self.options)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def ask(self, method: str, request: str) -> list[Any]:
        """Have each worker call this function of its `Contender`. Returns the answers by rank."""
        for channel in self.channels:
            with contextlib.suppress(OSError):  # a worker that has ended is noticed below
                channel.send((method, request))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self.options.timeout
        while missing := [rank for rank in range(len(self.channels)) if rank not in answers]:
            ready = wait([self.channels[rank] for rank in missing], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BenchmarkError(
                    f"{method}: no answer to '{request}' from ranks {missing} in {self.options.timeout:g} s: "
                    "it hangs, or so slow a link needs a longer --timeout"
                )
            for rank in missing:
                if self.channels[rank] in ready:
                    try:
                        answers[rank] = self.channels[rank].recv()
                    except (EOFError, OSError):
                        raise BenchmarkError(
                            f"{method}: rank {rank} ended; its error, if it has one, is above"
                        ) from None
        return [answers[rank] for rank in range(len(self.channels))]

    def steps(self, method: str, number: int) -> list[float]:
        """Take some steps. Returns the seconds of each on its slowest worker."""
        seconds = []
        for _ in range(number):
            self.ask(method, "prepare")
            seconds.append(max(self.ask(method, "step")))
        return seconds

    def turn(self, result: dict[str, Any], number: int) -> None:
        """Measure some steps of a method, after one for its data and its connections to be warm again."""
        self.steps(result["method"], 1)
        before = self.ask(result["method"], "sent")
        result["step_seconds"] += self.steps(result["method"], number)
        for rank, after in enumerate(self.ask(result["method"], "sent")):
            for counter, count in after.items():
                by_rank = result.setdefault(f"{counter}_bytes_by_rank", [0] * len(before))
                by_rank[rank] += count - before[rank][counter]

    def measure(self, rate: str) -> list[dict[str, Any]]:
        """All methods at one rate, in turns. Each takes as many steps as its time allows."""
        methods: list[str] = self.options.methods
        share = {m: min(self.options.steps, self.options.seconds / self.steps(m, 2)[-1]) for m in methods}
        results: list[dict[str, Any]] = [{"rate": rate, "method": m, "step_seconds": []} for m in methods]
        for _ in range(TURNS):
            for result in results:
                self.turn(result, max(1, round(share[result["method"]] / TURNS)))
        for result in results:
            times = result["step_seconds"]
            result |= {"median": statistics.median(times), "min": min(times), "max": max(times)}
            say(f"{rate}: {result['method']}: {result['median']:.4f} s a step ({len(times)} steps)")
        return results
