"""Distributed Lion written as plainly as the formulas stand, with no packing: the oracle of the tests."""

from __future__ import annotations

import torch
from torch import Tensor


class ReferenceLion:
    """All workers in one process; every tensor float32 and flat, one vote of -1, 0 or 1 an element.

    Args:
        parameters: the flat parameters, of any floating dtype; updated in place, in float32 and rounded.
        workers: N.
        lr, betas, weight_decay, aggregation, tie: as of ``DistributedLion``.
        lanes: for each element, the number whose parity its zero votes and alternating ties follow.
    """

    def __init__(
        self,
        parameters: Tensor,
        workers: int,
        lr: float,
        betas: tuple[float, float],
        weight_decay: float,
        aggregation: str,
        tie: str,
        lanes: Tensor,
    ) -> None:
        self.parameters = parameters
        self.workers = workers
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.aggregation, self.tie = aggregation, tie
        self.lanes = lanes
        self.momenta = [torch.zeros_like(parameters, dtype=torch.float32) for _ in range(workers)]
        self.steps = 0

    def step(self, gradients: list[Tensor]) -> None:
        """One step from every worker's gradient."""
        votes = torch.stack([self._vote(rank, gradient.float()) for rank, gradient in enumerate(gradients)])
        total = votes.sum(0)
        if self.aggregation == "avg" and self.workers > 1:
            decision = total / self.workers
        else:
            decision = torch.sign(total)
            if self.tie == "alternate" and self.workers > 1:
                alternating = ((self.lanes + self.steps) % 2 * 2 - 1).float()
                decision = torch.where(total == 0, alternating, decision)
        x = self.parameters.float()
        self.parameters.copy_(x - self.lr * (decision + self.weight_decay * x))
        self.steps += 1

    def _vote(self, rank: int, gradient: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        momentum = self.momenta[rank]
        direction = beta1 * momentum + (1 - beta1) * gradient
        self.momenta[rank] = beta2 * momentum + (1 - beta2) * gradient
        vote = torch.sign(direction)
        if self.workers > 1:
            alternating = ((self.lanes + rank + self.steps) % 2 * 2 - 1).float()
            vote = torch.where(vote == 0, alternating, vote)
        return vote
