"""The exact mean loss over all response tokens of the validation rows, whatever the batches and processes."""

from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import EvalPrediction

from .instruction_data import IGNORED

RESPONSE_LOSS = "response_loss"


def response_sums(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """Of each row the sum of the losses of its response tokens, and their number: all that leaves the process."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    sums = torch.stack(
        [
            # Row by row: the loss is computed in fp32, which for the whole batch would be all logits once more.
            cross_entropy(row[:-1].float(), target[1:], ignore_index=IGNORED, reduction="sum")
            for row, target in zip(logits, labels, strict=True)
        ]
    )
    return torch.stack([sums, (labels[:, 1:] != IGNORED).sum(dim=1).to(sums.dtype)], dim=1)


def response_loss(prediction: EvalPrediction) -> dict[str, float]:
    """In nats per response token."""
    loss, tokens = prediction.predictions.astype("float64").sum(axis=0)
    return {RESPONSE_LOSS: float(loss / tokens)}
