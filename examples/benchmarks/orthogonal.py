"""What orthogonalising the directions of `dmuon` costs, as a share of a training step.

    python -m examples.benchmarks.orthogonal --output model_cards/orthogonal

One process and one thread. A step is forward and backward of a batch, and DistributedMuon without a vote. Processor
time; writes every time into `results.json`.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from hf_dlion import DistributedMuon, hidden_matrices
from hf_dlion.bits.orthogonal import orthogonalize_into
from hf_dlion.optim.hidden import matrices_of

from .checks import SIZES, VOCABULARY, WARMUP_STEPS, build_model, processor_seconds
from .machine import machine


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
        times = processor_seconds(train), processor_seconds(lambda: orthogonalize_into(matrices, outputs))
        if step >= WARMUP_STEPS:
            whole.append(times[0])
            part.append(times[1])
    shares = [one / step for one, step in zip(part, whole, strict=True)]
    return {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hidden": sum(weight.numel() for weight, _ in weights),
        "matrices": len(matrices),
        "tokens_per_step": rows * length,
        "share_median": statistics.median(shares),
        "share_quartiles": statistics.quantiles(shares, n=4),
        "processor_seconds": {"step": whole, "orthogonalisation": part},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES, help="names of models")
    parser.add_argument("--rows", type=int, default=32, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="measured steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("orthogonal"), help="folder for results.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(name, options.rows, options.length, options.steps) for name in options.models]
    command = f"python -m examples.benchmarks.orthogonal --models {' '.join(options.models)} --rows {options.rows}"
    options.output.mkdir(parents=True, exist_ok=True)
    command = f"{command} --length {options.length} --steps {options.steps}"
    report = {"command": command, "machine": machine(), "models": found}
    Path(options.output, "results.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for one in found:
        low, _, high = one["share_quartiles"]
        print(
            f"{one['model']}, {one['parameters']:,} parameters, {one['tokens_per_step']} tokens a step: "
            f"orthogonalising {one['matrices']} matrices takes {one['share_median']:.1%} of it (quartiles {low:.1%} to "
            f"{high:.1%})"
        )


if __name__ == "__main__":
    main()
