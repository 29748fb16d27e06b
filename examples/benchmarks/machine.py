"""What the numbers of a benchmark depend on: processor, system, versions."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """For `results.json`, by name."""
    facts: dict[str, Any] = {"cpu": platform.processor(), "cores": os.cpu_count()}
    with contextlib.suppress(OSError, IndexError):
        facts["cpu"] = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
        facts["tcp"] = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    facts |= {"system": platform.platform(), "python": platform.python_version()}
    for name in ("torch", "hf-dlion"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts
