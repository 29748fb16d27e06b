"""What orthogonalising the directions of `dmuon` costs, as a share of a training step.

    python -m examples.benchmarks.orthogonal --output model_cards/orthogonal

One process and one thread. A step is forward and backward of a batch, and DistributedMuon without a vote, which
orthogonalises in five steps; in three, it is timed beside. Processor time; writes every time into `results.json`.
"""

import statistics
from collections.abc import Callable
from typing import Any

import torch

from hf_dlion import DistributedMuon, hidden_matrices
from hf_dlion.bits.orthogonal import orthogonalize_into
from hf_dlion.optim.hidden import matrices_of

from .shares import VOCABULARY, WARMUP_STEPS, build_model, measure_shares, processor_seconds, report


def measure(name: str, rows: int, length: int, steps: int) -> dict[str, Any]:
    """Processor seconds of whole steps, and of the orthogonalisation in each."""
    model = build_model(name, length)
    groups = hidden_matrices(model)
    optimizer = DistributedMuon(groups, lr=1e-5)
    hidden = [group for group in optimizer.param_groups if group["orthogonal"]]
    weights = [(weight.detach(), group["split"]) for group in hidden for weight in group["params"]]
    matrices = [matrix for weight, split in weights for matrix in matrices_of(weight, split)]
    outputs = [torch.empty_like(matrix) for matrix in matrices]
    tokens = torch.randint(VOCABULARY, (rows, length))

    def train() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    timed: dict[str, Callable[[], object]] = {
        "step": train,
        "orthogonalisation": lambda: orthogonalize_into(matrices, outputs),
        "in_three_steps": lambda: orthogonalize_into(matrices, outputs, 3),
    }
    times: dict[str, list[float]] = {name: [] for name in timed}
    for step in range(WARMUP_STEPS + steps):
        for what, run in timed.items():
            seconds = processor_seconds(run)
            if step >= WARMUP_STEPS:
                times[what].append(seconds)
    shares = [one / step for one, step in zip(times["orthogonalisation"], times["step"], strict=True)]
    of_five = statistics.median(
        three / five for three, five in zip(times["in_three_steps"], times["orthogonalisation"], strict=True)
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    hidden_size = sum(weight.numel() for weight, _ in weights)
    more = {"hidden": hidden_size, "matrices": len(matrices), "three_steps_over_five": of_five}
    return report(name, size, rows * length, shares, times, **more)


def main() -> None:
    measure_shares("examples.benchmarks.orthogonal", __doc__, "orthogonalising takes", measure, rows=32, steps=20)


if __name__ == "__main__":
    main()
