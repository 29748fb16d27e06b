"""What a bug report needs, ``hf_dlion env``, and what a step will take, ``hf_dlion plan``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

from . import plan

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "trl", "huggingface_hub", "safetensors", "numpy")
VARIABLES = ("OMP_NUM_THREADS", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
PREFIXES = ("NCCL_", "GLOO_", "TORCH_NCCL_", "TORCH_DISTRIBUTED_", "ACCELERATE_")


def main() -> int:
    """Run the command that the command line names. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="hf_dlion", description="Distributed Lion for Hugging Face.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="print what a bug report needs")
    plan.add_arguments(commands.add_parser("plan", help="predict the time and the bytes of a step, method by method"))
    options = parser.parse_args()
    if options.command == "plan":
        return plan.run(options)
    sys.stdout.writelines(f"- {name}: {value}\n" for name, value in environment())
    return 0


def environment() -> Iterator[tuple[str, str]]:
    """Versions, machine, backends and configuration, by name. No secrets: of variables, those of the launch only."""
    import torch
    import torch.distributed as dist

    for package in ("hf-dlion", *PACKAGES):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "Python", platform.python_version()
    yield "platform", platform.platform()
    yield "CPUs, threads of torch", f"{os.cpu_count()}, {torch.get_num_threads()}"
    yield "CUDA of torch", str(torch.version.cuda or torch.version.hip)
    yield "GPUs", ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none"
    known = dist.Backend.backend_list if dist.is_available() else []
    usable = [name for name in known if getattr(dist, f"is_{name}_available", lambda: False)()]
    yield "backends", ", ".join(usable) or "none"
    for name in sorted(os.environ):
        if name in VARIABLES or name.startswith(PREFIXES):
            yield name, os.environ[name]
    yield "accelerate's configuration", _accelerate_configuration()


def _accelerate_configuration() -> str:
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    return f"{path}\n{path.read_text(encoding='utf-8').rstrip()}" if path.is_file() else "none by default"


if __name__ == "__main__":
    sys.exit(main())
