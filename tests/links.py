"""Network namespaces for workers, with links that can be cut: as root, on Linux, with iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

NEEDS_ROOT = "network namespaces need root (CAP_SYS_ADMIN) and iproute2"


def namespaces_work() -> bool:
    name = f"probe-{os.getpid()}"
    if not (shutil.which("ip") and shutil.which("tc")):
        return False
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    return made and subprocess.run(["ip", "netns", "delete", name], capture_output=True).returncode == 0


class Links:
    """Those of a number of workers, each in a namespace of its own, to a bridge in one more."""

    def __init__(self, workers: int) -> None:
        self._hub, *self.namespaces = [f"links{os.getpid()}-{name}" for name in ("hub", *range(workers))]
        self.addresses = [f"10.0.0.{worker + 1}" for worker in range(workers)]

    def make(self) -> None:
        for name in (self._hub, *self.namespaces):
            _ip(f"netns add {name}")
        _ip(f"-n {self._hub} link add bridge up type bridge")
        for worker, (name, address) in enumerate(zip(self.namespaces, self.addresses, strict=True)):
            _ip(f"-n {self._hub} link add port{worker} type veth peer name eth0 netns {name}")
            _ip(f"-n {self._hub} link set port{worker} master bridge up")
            _ip(f"-n {name} address add {address}/24 dev eth0")
            for device in ("lo", "eth0"):
                _ip(f"-n {name} link set {device} up")

    def set(self, worker: int, state: str) -> None:
        """``down`` cuts a worker off, ``up`` mends its link."""
        _ip(f"-n {self._hub} link set port{worker} {state}")

    def remove(self) -> None:
        for name in (self._hub, *self.namespaces):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextmanager
def links(workers: int) -> Iterator[Links]:
    made = Links(workers)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)
