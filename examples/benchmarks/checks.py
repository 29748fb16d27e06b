"""What the checks that are on by default cost, as a share of a training step of examples/pretrain_gpt2.py.

    python -m examples.benchmarks.checks --output model_cards/checks

One process and one thread. A step is forward and backward of a batch, and Lion without a vote: with the vote it takes
longer, and the share is smaller. The checks: looking for NaN and Inf in every gradient, at each step; a checksum of the
parameters, each hundredth step; and the digest of the hyperparameters. Processor time; writes every time into
`results.json`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from hf_dlion import DistributedLion
from hf_dlion.bits.hashing import checksum, digest
from hf_dlion.optim.agreement import first_bad_gradient

from .machine import machine

SIZES = {"gpt2-tiny": (4, 4, 128), "gpt2-mini": (6, 5, 160)}  # layers, heads, width
VOCABULARY = 2048
EVERY = 100
WARMUP_STEPS = 3


def processor_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def build_model(name: str, positions: int) -> PreTrainedModel:
    """The model that `pretrain_gpt2.py` has by this name, for blocks of so many tokens."""
    layers, heads, width = SIZES[name]
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": positions, "vocab_size": VOCABULARY}
    return AutoModelForCausalLM.from_config(GPT2Config(**shape, **dropout, use_cache=False))


def hyperparameters(optimizer: DistributedLion) -> dict[str, Any]:
    """Each setting of each group, as the ranks compare them."""
    groups = enumerate(optimizer.param_groups)
    return {
        f"{name} of param group {index}": group[name] for index, group in groups for name in optimizer.hyperparameters()
    }


def measure(name: str, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Processor seconds of each part of each step."""
    model = build_model(name, length)
    optimizer = DistributedLion(model.parameters(), lr=1e-5)
    parameters = list(model.parameters())
    tokens = torch.randint(VOCABULARY, (rows, length))
    times: dict[str, list[float]] = {"step": [], "bad gradients": [], "checksum": [], "digest": []}
    for step in range(WARMUP_STEPS + steps):

        def train() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()

        parts: dict[str, Callable[[], Any]] = {
            "step": train,
            "bad gradients": lambda: first_bad_gradient([parameter.grad for parameter in parameters]),
            "checksum": lambda: checksum(parameters),
            "digest": lambda: digest(hyperparameters(optimizer)),
        }
        for part, work in parts.items():
            seconds = processor_seconds(work)
            if step >= WARMUP_STEPS:
                times[part].append(seconds)
        optimizer.zero_grad()
    checks = [b + c / EVERY + d for b, c, d in zip(*(times[part] for part in list(times)[1:]), strict=True)]
    shares = [check / step for check, step in zip(checks, times["step"], strict=True)]
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "tokens_per_step": rows * length,
        "share_median": statistics.median(shares),
        "share_quartiles": statistics.quantiles(shares, n=4),
        "processor_seconds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES, help="names of models")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="measured steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("checks"), help="folder for results.json (default: checks)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(name, options.rows, options.length, options.steps) for name in options.models]
    command = f"python -m examples.benchmarks.checks --rows {options.rows} --length {options.length}"
    options.output.mkdir(parents=True, exist_ok=True)
    report = {"command": f"{command} --steps {options.steps}", "machine": machine(), "models": found}
    Path(options.output, "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for one in found:
        low, _, high = one["share_quartiles"]
        print(
            f"{one['model']}, {one['parameters']:,} parameters, {one['tokens_per_step']} tokens a step: the checks "
            f"take {one['share_median']:.2%} of it (quartiles {low:.2%} to {high:.2%})"
        )


if __name__ == "__main__":
    main()
