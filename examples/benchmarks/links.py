"""A network namespace a worker, joined by links of a limited rate. Linux, root and iproute2.

tbf's bucket holds 72 KiB, or what 0.5 ms let through if that is more, so that a piece of up to 64 KiB, which the kernel
passes on whole, passes whole. So much of each step is free of the limit.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

from .stopping import ignore_signals

UNLIMITED = "unlimited"
BURST_BYTES = 72 * 1024
BURST_SECONDS = 0.5e-3
QUEUE_BYTES = 8 * 2**20  # of tbf: more than TCP has in flight here, so that nothing is dropped
PREFIX = "dlion"


class BenchmarkError(Exception):
    """What went wrong, and what to do instead."""


def bits_per_second(rate: str) -> float:
    """`100mbit` -> 1e8; `unlimited` -> inf."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg])bit", rate)
    bits = float(match[1]) * {"k": 1e3, "m": 1e6, "g": 1e9}[match[2]] if match else 0.0
    if rate != UNLIMITED and bits < 1e3:
        raise BenchmarkError(f"unknown rate '{rate}': give a number and kbit, mbit or gbit, or {UNLIMITED}")
    return bits or math.inf


def call(*command: str) -> str:
    """Run `ip` or `tc`. Returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise BenchmarkError(
            f"`{shlex.join(command)}`: {done.stderr.strip()}. Namespaces need root with CAP_NET_ADMIN and "
            "CAP_SYS_ADMIN, and the kernel's veth, bridge and sch_tbf; --loopback measures without them"
        )
    return done.stdout


def remove_namespaces(of_run: str | None = None) -> None:
    """Remove the namespaces of one run, or of all runs whose process is gone."""
    for name in re.findall(rf"^{PREFIX}\d+-\w+", call("ip", "netns", "list"), re.MULTILINE):
        run = name.partition("-")[0]
        if run == of_run or not (of_run or Path("/proc", run.removeprefix(PREFIX)).exists()):
            with contextlib.suppress(BenchmarkError):
                call("ip", "netns", "delete", name)


@contextlib.contextmanager
def namespaces(workers: int) -> Iterator[list[str]]:
    """A namespace a worker, each with a link `eth0` to the bridge in one more, which is the last of them."""
    run = f"{PREFIX}{os.getpid()}"
    *names, hub = [f"{run}-{rank}" for rank in range(workers)] + [f"{run}-hub"]
    remove_namespaces()
    try:
        call("ip", "netns", "add", hub)
        call("ip", "-n", hub, "link", "add", "bridge", "up", "type", "bridge")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            call("ip", "netns", "add", name)
            call(*f"ip -n {hub} link add {port} type veth peer name eth0 netns {name}".split())
            call("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
            with contextlib.suppress(BenchmarkError):  # IPv6, if there is any, would send on its own
                call("ip", "-n", name, "link", "set", "eth0", "addrgenmode", "none")
            call("ip", "-n", name, "address", "add", f"10.0.0.{rank + 1}/24", "dev", "eth0")
            call("ip", "-n", name, "link", "set", "eth0", "up")
        yield [*names, hub]
    finally:
        ignore_signals()
        remove_namespaces(run)


def limit(names: list[str], bits: float) -> None:
    """Limit both ends of each link to so many bits a second."""
    discipline = ["noqueue"]
    if bits < math.inf:
        burst = max(BURST_BYTES, round(bits / 8 * BURST_SECONDS))
        discipline = ["tbf", "rate", f"{bits:.0f}bit", "burst", f"{burst}", "limit", f"{QUEUE_BYTES}"]
    for rank, name in enumerate(names[:-1]):
        call("tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root", *discipline)
        call("tc", "-n", names[-1], "qdisc", "replace", "dev", f"port{rank}", "root", *discipline)
