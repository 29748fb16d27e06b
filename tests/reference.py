"""Distributed Lion written as plainly as the formulas stand, with no packing: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        decision = self._scaled(decision, len(cast) if self.aggregation == "avg" else 1)
        x = self.parameters.float()
        self.parameters.copy_(self.rounding(x - self.lr * (decision + self.weight_decay * x), self.steps))
        self.steps += 1

    def _vote(self, rank: int, gradient: Tensor) -> Tensor:
        vote = torch.sign(self._direction(rank, gradient))
        if self.workers > 1:
            alternating = ((self.lanes + rank + self.steps) % 2 * 2 - 1).float()
            vote = torch.where(vote == 0, alternating, vote)
        return vote

    def _direction(self, rank: int, gradient: Tensor) -> Tensor:
        beta1, beta2 = self.betas
        momentum = self.momenta[rank]
        direction = beta1 * momentum + (1 - beta1) * gradient
        self.momenta[rank] = beta2 * momentum + (1 - beta2) * gradient
        return direction

    def _scaled(self, decision: Tensor, voters: int) -> Tensor:
        return decision


class ReferenceMuon(ReferenceLion):
    """Distributed Muon, as plainly: a hidden matrix votes on its orthogonalised direction.

    Args:
        parameters, workers, lr, betas, weight_decay, aggregation, tie, lanes: as of :class:`ReferenceLion`.
        hidden_betas: of hidden parameters.
        hidden: for each hidden parameter its place among the elements, and its shape.
        cuts: for each hidden parameter the indices of its matrices' elements, each a tensor ``[rows, columns]``.
    """

    def __init__(
        self,
        *args: Any,
        hidden_betas: tuple[float, float],
        hidden: list[slice],
        cuts: list[list[Tensor]],
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.hidden = hidden
        self.cuts = cuts
        self.beta1 = torch.full_like(self.momenta[0], self.betas[0])
        self.beta2 = torch.full_like(self.momenta[0], self.betas[1])
        self.rest1, self.rest2 = (torch.full_like(self.momenta[0], 1 - beta) for beta in self.betas)
        for place in hidden:
            self.beta1[place], self.rest1[place] = hidden_betas[0], 1 - hidden_betas[0]
            self.beta2[place], self.rest2[place] = hidden_betas[1], 1 - hidden_betas[1]

    def _direction(self, rank: int, gradient: Tensor) -> Tensor:
        momentum = self.momenta[rank]
        direction = self.beta1 * momentum + self.rest1 * gradient
        self.momenta[rank] = self.beta2 * momentum + self.rest2 * gradient
        for place, matrices in zip(self.hidden, self.cuts, strict=True):
            own = direction[place].clone()
            for indices in matrices:
                direction[place][indices] = newton_schulz(own[indices])
        return direction

    def _scaled(self, decision: Tensor, voters: int) -> Tensor:
        scaled = decision * torch.tensor(0.2)
        for place in self.hidden:
            squares = (decision[place].double() * voters).round().square().sum()
            rms = (squares / len(decision[place])).sqrt() / voters
            scaled[place] = decision[place] * (0.2 / torch.where(rms > 0, rms, 1.0)).float()
        return scaled


def newton_schulz(u: Tensor) -> Tensor:
    """Five iterations, on the transpose where there are more rows than columns."""
    x = u.T if u.shape[0] > u.shape[1] else u
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.T if u.shape[0] > u.shape[1] else x
