"""What orthogonalising the directions of `dmuon` costs, as a share of a training step.

    python -m examples.benchmarks.orthogonal --output model_cards/orthogonal

One process and one thread. A step is forward and backward of a batch, and DistributedMuon without a vote. Processor
time; writes every time into `results.json`.
"""

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

    whole, part = [], []
    for step in range(WARMUP_STEPS + steps):
        seconds = processor_seconds(train), processor_seconds(lambda: orthogonalize_into(matrices, outputs))
        if step >= WARMUP_STEPS:
            whole.append(seconds[0])
            part.append(seconds[1])
    shares = [one / step for one, step in zip(part, whole, strict=True)]
    size = sum(parameter.numel() for parameter in model.parameters())
    times = {"step": whole, "orthogonalisation": part}
    hidden_size = sum(weight.numel() for weight, _ in weights)
    return report(name, size, rows * length, shares, times, hidden=hidden_size, matrices=len(matrices))


def main() -> None:
    measure_shares("examples.benchmarks.orthogonal", __doc__, "orthogonalising takes", measure, rows=32, steps=20)


if __name__ == "__main__":
    main()
