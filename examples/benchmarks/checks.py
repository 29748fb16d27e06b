"""What the checks that are on by default cost, as a share of a training step of examples/pretrain_gpt2.py.

    python -m examples.benchmarks.checks --output model_cards/checks

One process and one thread. A step is forward and backward of a batch, and Lion without a vote: with the vote it takes
longer, and the share is smaller. The checks: looking for NaN and Inf in every gradient, at each step; a checksum of the
parameters, each hundredth step; and the digest of the hyperparameters. Processor time; writes every time into
`results.json`.
"""

from collections.abc import Callable
from typing import Any

import torch

from hf_dlion import DistributedLion
from hf_dlion.bits.hashing import checksum, digest
from hf_dlion.optim.bad_gradients import first_bad_gradient

from .shares import VOCABULARY, WARMUP_STEPS, build_model, measure_shares, processor_seconds, report

EVERY = 100


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
    size = sum(parameter.numel() for parameter in parameters)
    return report(name, size, rows * length, shares, times)


def main() -> None:
    measure_shares("examples.benchmarks.checks", __doc__, "the checks take", measure, rows=4, steps=60)


if __name__ == "__main__":
    main()
