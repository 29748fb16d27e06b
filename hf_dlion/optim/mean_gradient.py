"""Methods whose workers send codes of their gradients, whose mean drives a common rule."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from ..wire.collectives import Channel
from ..wire.sums import sum_dense
from .agreement import Note, first_bad_gradient
from .rules import RULES
from .workers import STEP, WorkersOptimizer, check_betas, check_range


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
        process_group: the workers; None is the default group.
        local_state: keys of what a worker keeps for itself.

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
        process_group: dist.ProcessGroup | None = None,
        local_state: tuple[str, ...] = (),
    ) -> None:
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} is not known; it is one of {', '.join(map(repr, RULES))}.")
        self.rule = rule
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas, "eps": eps}
        super().__init__(params, defaults, process_group, (*RULES[rule].state_names, *local_state))

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
            FloatingPointError: a gradient has a NaN or Inf on some rank; raised on all ranks.
            RuntimeError: the ranks do not fit together, or all have the same gradients at the first step; raised on
                all ranks. Or a gradient is sparse.

            Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = self._all_parameters()
        gradients = self._gradients(parameters)
        channel = self._make_channel() if self.workers > 1 else None
        self._agree(channel, parameters, gradients)
        flat = [_flat(p, g) for p, g in zip(parameters, gradients, strict=True)]
        states = [self.state[parameter] for parameter in parameters]
        sizes = [parameter.numel() for parameter in parameters]
        total = self._sum(channel, flat, states)
        means = (total / self.workers).split(sizes)
        place = 0
        for group in self.param_groups:
            count = len(group["params"])
            self._apply(group, means[place : place + count])
            group[STEP] += 1
            place += count
        self.ledger.steps += 1
        return loss

    @abstractmethod
    def _sum(self, channel: Channel | None, gradients: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> Tensor:
        """What the workers' codes of their gradients sum to; changes what this worker keeps.

        Args:
            channel: the workers; None for one alone.
            gradients: float32, flat, one a parameter.
            states: of each parameter.

        Returns:
            float32, flat, all parameters one after the other.
        """

    def _agree(self, channel: Channel | None, parameters: list[Tensor], gradients: list[Tensor | None]) -> None:
        bad = first_bad_gradient(gradients)
        if channel is None:
            if bad >= 0:
                raise FloatingPointError(self._describe_bad(bad))
            return
        if not self.opened or self._checking_gradients:
            self._open(channel, parameters, gradients, compiled=False)
        notes, work = channel.all_gather(self._note(bad, parameters[0].device))
        work.wait()
        self._check_notes(channel, Note.unpack(notes))

    def _apply(self, group: dict[str, Any], means: Sequence[Tensor]) -> None:
        parameters = group["params"]
        wide = [p if p.dtype == torch.float32 else p.float() for p in parameters]
        gradients = [mean.view(p.shape) for mean, p in zip(means, parameters, strict=True)]
        RULES[self.rule].apply(wide, gradients, [self.state[p] for p in parameters], group)
        for parameter, updated in zip(parameters, wide, strict=True):
            if updated is not parameter:
                parameter.copy_(updated)

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_betas(group["betas"])
        check_range("momentum", group["momentum"], "it is a decay, at least 0 and less than 1.", below=1)
        check_range("eps", group["eps"], "it cannot be negative.")

    def _options(self) -> dict[str, Any]:
        return {"method": type(self).__name__, "rule": self.rule}

    def _settings(self) -> tuple[str, ...]:
        return ("lr", "weight_decay", *RULES[self.rule].settings)


class DenseMean(MeanGradient):
    """The gradients themselves are averaged: 32 bits a parameter up, and 32 down."""

    def _sum(self, channel: Channel | None, gradients: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> Tensor:
        flat = torch.cat(list(gradients))
        return flat if channel is None else sum_dense(channel, flat)


def _flat(parameter: Tensor, gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    return gradient.float().reshape(-1)
