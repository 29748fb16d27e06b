"""Methods whose workers send codes of their gradients, whose mean drives a common rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..wire.collectives import Channel
from ..wire.sums import sum_dense
from .agreement import Note
from .rounding import round_at_random, rounding_seed
from .rules import RULES
from .workers import STEP, WorkersOptimizer, WorkersOptions, check_betas, check_range


class RuleOptions(WorkersOptions, total=False):
    """Keyword arguments of methods that step by a rule; see :class:`MeanGradient`."""

    rule: str
    betas: tuple[float, float]
    eps: float


class MeanGradient(WorkersOptimizer):
    """Every worker sends its gradient in some code; the mean of what arrives is the gradient of a rule.

    A parameter without a gradient on a worker counts as a gradient of zero. As with :class:`DistributedLion`,
    gradients must be each worker's own, and parameters are the same on all workers, bit for bit, after every step.

    Args:
        params: parameters, named parameters or param groups; dense, real floating point, on one device.
        lr: learning rate.
        weight_decay: as the rule has it.
        rule: ``"sgd"``, ``"adamw"`` or ``"lion"``.
        momentum: of ``"sgd"``.
        betas: of ``"adamw"`` and ``"lion"``.
        eps: of ``"adamw"``.
        local_state: keys of what a worker keeps for itself.
        process_group, on_bad_gradient, check_replicas_every: as in :class:`WorkersOptimizer`.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        rule: str = "sgd",
        momentum: float = 0.9,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        local_state: tuple[str, ...] = (),
        **workers: Unpack[WorkersOptions],
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is not known; it is one of {', '.join(map(repr, RULES))}.")
        self.rule = rule
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, defaults, RULES[rule].state_names, local_state, **workers)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Average and update. A collective over the workers.

        Args:
            closure: computes the loss again and returns it.

        Raises:
            FloatingPointError: all ranks have a NaN or Inf in a gradient, or one has with ``on_bad_gradient="raise"``;
                raised on all ranks.
            RuntimeError: the ranks do not fit together, or all have the same gradients at the first step; raised on
                all ranks. Or a gradient is sparse.

            Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._all_parameters()
        gradients, bad = self._gradients(parameters)
        channel = self._make_channel() if self.workers > 1 else None
        voters = self._agree(channel, parameters, gradients, bad)
        if voters:
            flat = [_flat(p, g) for p, g in zip(parameters, gradients, strict=True)]
            states = [self.state[parameter] for parameter in parameters]
            if bad >= 0:  # it takes part in the rounds, uncounted, and keeps its state
                states = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
            total = self._sum(channel, voters, flat, states)
            means = (total / len(voters)).split([parameter.numel() for parameter in parameters])
            place = 0
            for group in self.param_groups:
                count = len(group["params"])
                self._apply(group, means[place : place + count], place)
                place += count
        for group in self.param_groups:
            group[STEP] += 1
        self.ledger.steps += 1
        return loss

    @abstractmethod
    def _sum(
        self,
        channel: Channel | None,
        voters: Sequence[int],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> Tensor:
        """What the workers' codes of their gradients sum to; changes what this worker keeps.

        Args:
            channel: the workers; None for one alone.
            voters: the ranks that count.
            gradients: float32, flat, one a parameter.
            states: of each parameter.

        Returns:
            float32, flat, all parameters one after the other.
        """

    def _agree(
        self, channel: Channel | None, parameters: list[Tensor], gradients: list[Tensor | None], bad: int
    ) -> list[int]:
        """The ranks that count in this step."""
        if channel is None:
            self._check_alone(bad)
            return [0] if bad < 0 else []
        if not self.opened or self._checking_gradients:
            self._open(channel, parameters, gradients, compiled=False)
        notes, work = channel.all_gather(self._note(bad, parameters))
        work.wait()
        return self._voters(channel, Note.unpack(notes))

    def _apply(self, group: dict[str, Any], means: Sequence[Tensor], first: int) -> None:
        parameters = group["params"]
        wide = [p if p.dtype == torch.float32 else p.float() for p in parameters]
        gradients = [mean.view(p.shape) for mean, p in zip(means, parameters, strict=True)]
        RULES[self.rule].apply(wide, gradients, [self.state[p] for p in parameters], group)
        for index, (parameter, updated) in enumerate(zip(parameters, wide, strict=True), first):
            if parameter.dtype == torch.bfloat16:
                places = torch.arange(updated.numel(), dtype=torch.int32, device=updated.device).view(updated.shape)
                updated = round_at_random(updated, places, rounding_seed(group[STEP], index, 0, updated.device))
            if updated is not parameter:
                parameter.copy_(updated)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a hyperparameter is out of its range."""
        super().check_group(group)
        check_betas(group["betas"])
        check_range("momentum", group["momentum"], "it is a decay, at least 0 and less than 1.", below=1)
        check_range("eps", group["eps"], "it cannot be negative.")

    def options(self) -> dict[str, Any]:
        """Options that must be the same on all ranks, besides hyperparameters."""
        return super().options() | {"rule": self.rule}

    def settings(self) -> tuple[str, ...]:
        """Names of the hyperparameters that must be the same on all ranks at every step."""
        return ("lr", "weight_decay", *RULES[self.rule].settings)


class DenseMean(MeanGradient):
    """The gradients themselves are averaged: 32 bits a parameter up, and 32 down."""

    def _sum(
        self,
        channel: Channel | None,
        voters: Sequence[int],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> Tensor:
        flat = torch.cat(list(gradients))
        return flat if channel is None else sum_dense(channel, flat, voters)


def _flat(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    return gradient.float().reshape(-1)
