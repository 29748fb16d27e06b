"""Distributed Lion written as plainly as the formulas stand, with no packing: the oracle of the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    def step(self, gradients: list[Tensor | None], missing: list[Tensor] | None = None) -> None:
        """One step from every worker's gradient; None is a worker that abstains.

        Of each worker, ``missing`` says which elements it has no gradient for.
        """
        missing = missing or [torch.zeros_like(self.parameters, dtype=torch.bool) for _ in gradients]
        pairs = list(zip(gradients, missing, strict=True))
        cast = [self._vote(rank, g.float(), gone) for rank, (g, gone) in enumerate(pairs) if g is not None]
        absent = torch.stack([gone for g, gone in pairs if g is not None]).all(0)
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
        stepped = self.rounding(x - self.lr * (decision + self.weight_decay * x), self.steps)
        self.parameters.copy_(torch.where(absent, self.parameters, stepped))
        self.steps += 1

    def _vote(self, rank: int, gradient: Tensor, missing: Tensor) -> Tensor:
        before = self.momenta[rank]
        vote = torch.where(missing, 0.0, torch.sign(self._direction(rank, gradient)))
        self.momenta[rank] = torch.where(missing, before, self.momenta[rank])
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
        orthogonalize: one matrix.
    """

    def __init__(
        self,
        *args: Any,
        hidden_betas: tuple[float, float],
        hidden: list[slice],
        cuts: list[list[Tensor]],
        orthogonalize: Callable[[Tensor], Tensor] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.orthogonalize = orthogonalize or newton_schulz
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
                direction[place][indices] = self.orthogonalize(own[indices])
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
    x = u.T.contiguous() if u.shape[0] > u.shape[1] else u
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return x.T if u.shape[0] > u.shape[1] else x


def three_steps(u: Tensor, dtype: torch.dtype) -> Tensor:
    """With coefficients and a norm for as few, on the transpose as above."""
    x = u.T.contiguous() if u.shape[0] > u.shape[1] else u
    x = (x / (x.norm() + 1e-7)).to(dtype)
    norm = (x @ x.T).float().norm() + 1e-7
    first = ((x @ x.T).float() / norm).to(dtype)
    x = (x.float() / norm.sqrt()).to(dtype)
    x = 8.2193 * x + (-23.3375 * first + 16.6266 * (first @ first)) @ x
    for a, b, c in ((4.0034, -2.9228, 0.5419), (3.4709, -2.5494, 0.5002)):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.T if u.shape[0] > u.shape[1] else x).float()


class ReferenceLocalSteps:
    """Local steps and votes on displacements, as plainly: every worker with parameters and an optimizer of its own.

    Args:
        parameters: float32, contiguous; the x_0 of every later time are in ``voted``.
        workers: N.
        inner: makes the optimizer of a worker for its parameters.
        every, outer_lr, outer_momentum, nesterov, aggregation, tie, delay: as of ``LocalSteps``.
        parts: of several fragments, after how many steps of a round each votes, and its parameters.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        workers: int,
        inner: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
        every: int,
        outer_lr: float = 1.0,
        outer_momentum: float = 0.0,
        nesterov: bool = True,
        aggregation: str = "mavo",
        tie: str = "alternate",
        delay: int = 0,
        parts: dict[int, list[int]] | None = None,
    ) -> None:
        self.delay = delay
        self.parts = {every: list(range(len(parameters)))} if parts is None else parts
        self.flight: tuple[int, list[int], list[list[Tensor]]] | None = None
        self.voted = [parameter.detach().clone() for parameter in parameters]
        self.own = [[torch.nn.Parameter(x.clone()) for x in self.voted] for _ in range(workers)]
        self.inner = [inner(params) for params in self.own]
        outer: dict[str, Any] = {
            "lr": outer_lr,
            "momentum": outer_momentum,
            "nesterov": nesterov and outer_momentum > 0,
        }
        self.outer = [torch.optim.SGD([x], **outer) for x in self.voted]
        self.every, self.aggregation, self.tie = every, aggregation, tie
        self.steps = 0

    def step(self, gradients: Sequence[Sequence[Tensor | None] | None]) -> None:
        """One inner step from every worker's gradients, by parameter; None is a worker that leaves it out."""
        for params, inner, given in zip(self.own, self.inner, gradients, strict=True):
            if given is not None:
                for parameter, gradient in zip(params, given, strict=True):
                    parameter.grad = None if gradient is None else gradient.clone()
                inner.step()
        self.steps += 1
        if self.flight is not None and self.steps == self.flight[0] + self.delay:
            self._land()
        for turn, part in self.parts.items():
            if self.steps % self.every == turn % self.every:
                self.flight = (self.steps, part, [[x.detach().clone() for x in params] for params in self.own])
                if not self.delay:
                    self._land()

    def vote(self, abstaining: Sequence[int] = ()) -> None:
        """Of all workers but those that abstain, on all parameters."""
        if self.flight is not None:
            self._land()
        self.flight = (self.steps, list(range(len(self.voted))), [[x.detach() for x in params] for params in self.own])
        self._land(abstaining)

    @torch.no_grad()
    def _land(self, abstaining: Sequence[int] = ()) -> None:
        assert self.flight is not None
        sent_after, part, sent = self.flight
        voting = [rank for rank in range(len(self.own)) if rank not in abstaining]
        place, number, self.flight = 0, -(-sent_after // self.every), None
        for index in part:
            x = self.voted[index]
            moved = [(x - sent[rank][index]).view(-1) for rank in voting]
            since = [params[index] - before[index] for params, before in zip(self.own, sent, strict=True)]
            if any(bool(d.any()) for d in moved):
                x.grad = self._decided(moved, voting, torch.arange(place, place + x.numel()), number).view(x.shape)
                self.outer[index].step()
                place += x.numel()
            for params, own in zip(self.own, since, strict=True):
                params[index].copy_(x + own)

    def _decided(self, moved: list[Tensor], voting: list[int], places: Tensor, number: int) -> Tensor:
        if self.aggregation == "mean":
            return _sum_in_order(moved) / len(moved)
        alternating = [((places + rank + number) % 2 * 2 - 1).float() for rank in voting]
        alone = len(self.own) == 1
        votes = [
            d.sign() if alone else torch.where(d == 0, z, d.sign()) for d, z in zip(moved, alternating, strict=True)
        ]
        total = torch.stack(votes).sum(0)
        decision = total / len(moved) if self.aggregation == "avg" else total.sign()
        if self.aggregation == "mavo" and self.tie == "alternate" and not alone:
            decision = torch.where(total == 0, ((places + number) % 2 * 2 - 1).float(), decision)
        scales = torch.empty_like(decision)
        for start in range(0, len(places), 256):
            block = slice(start, start + 256)
            scales[block] = _sum_in_order([_mean_magnitude(d[block]) for d in moved]) / len(moved)
        return decision * scales


def _mean_magnitude(block: Tensor) -> Tensor:
    whole = torch.zeros(2, 256)  # two rows, so that torch adds in the order that it has for many
    whole[0, : len(block)] = block.abs()
    return whole.sum(1)[0] / len(block)


def _sum_in_order(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    return total
