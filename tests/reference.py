"""Distributed Lion written as plainly as the formulas stand, with no packing: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ReferenceLion:
    """All workers in one process; every tensor float32 and flat, one vote of -1, 0 or 1 an element.

    Args:
        parameters: the flat parameters, of any floating dtype; updated in place, in float32 and rounded to nearest,
            or by ``rounding``.
        workers: N.
        lr, betas, weight_decay, aggregation, tie: as of ``DistributedLion``.
        lanes: for each element, the number whose parity its zero votes and alternating ties follow.
        rounding: from float32 and the step number to the dtype of the parameters.
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
        rounding: Callable[[Tensor, int], Tensor] = lambda updated, step: updated,
    ) -> None:
        self.parameters = parameters
        self.workers = workers
        self.lr, self.betas, self.weight_decay = lr, betas, weight_decay
        self.aggregation, self.tie = aggregation, tie
        self.lanes = lanes
        self.rounding = rounding
        self.momenta = [torch.zeros_like(parameters, dtype=torch.float32) for _ in range(workers)]
        self.steps = 0

    def step(self, gradients: list[Tensor | None]) -> None:
        """One step from every worker's gradient; None is a worker that abstains."""
        cast = [self._vote(rank, g.float()) for rank, g in enumerate(gradients) if g is not None]
        total = torch.stack(cast).sum(0)
        if self.aggregation == "avg" and self.workers > 1:
            decision = total / len(cast)
        else:
            decision = torch.sign(total)
            if self.tie == "alternate" and self.workers > 1:
                alternating = ((self.lanes + self.steps) % 2 * 2 - 1).float()
                decision = torch.where(total == 0, alternating, decision)
        x = self.parameters.float()
        self.parameters.copy_(self.rounding(x - self.lr * (decision + self.weight_decay * x), self.steps))
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
