#!/usr/bin/env python
"""What the checks that are on by default cost, as a share of a training step of examples/pretrain_gpt2.py.

    python examples/benchmark_checks.py --output model_cards/checks

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
from benchmark_network import machine
from gpt2_models import NAMES, TINY, build_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_dlion import DistributedLion
from hf_dlion.optim.agreement import checksum, digest, first_bad_gradient

EVERY = 100
WARMUP_STEPS = 3


def processor_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = {str(number): number for number in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), eos_token="0")


def measure(name: str, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Processor seconds of each part of each step."""
    model = build_model(name, tokenizer(2048), length)
    optimizer = DistributedLion(model.parameters(), lr=1e-5)
    parameters = list(model.parameters())
    tokens = torch.randint(2048, (rows, length))
    times: dict[str, list[float]] = {"step": [], "bad gradients": [], "checksum": [], "digest": []}
    for step in range(WARMUP_STEPS + steps):

        def train() -> None:
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()

        parts: dict[str, Callable[[], Any]] = {
            "step": train,
            "bad gradients": lambda: first_bad_gradient([parameter.grad for parameter in parameters]),
            "checksum": lambda: checksum(parameters),
            "digest": lambda: digest(optimizer._describe_settings()),
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
    parser.add_argument("--models", nargs="+", default=[TINY, "gpt2-mini"], choices=NAMES, help="names of models")
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=60, help="measured steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("checks"), help="folder for results.json (default: checks)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(name, options.rows, options.length, options.steps) for name in options.models]
    command = f"python examples/benchmark_checks.py --rows {options.rows} --length {options.length}"
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
