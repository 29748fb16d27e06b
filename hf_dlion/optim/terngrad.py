"""TernGrad (Wen et al., NeurIPS 2017, arXiv 1705.07878, Algorithm 1 with its section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..wire.collectives import Channel
from ..wire.sums import sum_ternary
from .agreement import digest
from .mean_gradient import MeanGradient, RuleOptions
from .workers import STEP, check_range


class TernGrad(MeanGradient):
    """Workers send their gradients as -1, 0 or 1, at random without bias.

    For each layer (here, parameter) of worker i's gradient g_i, with sigma its standard deviation::

        g_i = clamp(g_i, -clip * sigma, clip * sigma)           # gradient clipping
        s   = max over workers of max|g_i|                      # scaler sharing
        t_i = sign(g_i) * Bernoulli(|g_i| / s)                  # what travels, 2 bits
        g   = s / N * sum_i t_i                                 # the gradient of the rule; log2(2N+1) bits back

    The scalers take one round of 32 bits a layer. Random numbers depend on seed, rank and step only.

    Args:
        params, lr, weight_decay: as in :class:`MeanGradient`.
        clip: in standard deviations; the paper's 2.5. 0 turns clipping off.
        seed: of the random numbers.
        momentum: of the default rule, SGD.
        shared: as in :class:`MeanGradient`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        *,
        clip: float = 2.5,
        seed: int = 0,
        momentum: float = 0.9,
        **shared: Unpack[RuleOptions],
    ) -> None:
        check_range("clip", clip, "it is a number of standard deviations, or 0.")
        self.clip = clip
        self.seed = seed
        super().__init__(params, lr, weight_decay, momentum=momentum, **shared)

    def _sum(
        self,
        channel: Channel | None,
        voters: Sequence[int],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
    ) -> Tensor:
        rank = 0 if channel is None else channel.rank
        clipped = [self._clipped(gradient) for gradient in gradients]
        scalers = torch.stack([g.abs().max() if g.numel() else g.new_zeros(()) for g in clipped])
        if channel is not None:
            everyone, work = channel.all_gather(scalers)
            work.wait()
            scalers = everyone[list(voters)].amax(0)
        generator = torch.Generator(scalers.device)
        generator.manual_seed(digest((self.seed, rank, self.param_groups[0][STEP])))
        ternary = torch.cat([self._ternary(g, s, generator) for g, s in zip(clipped, scalers, strict=True)])
        counts = ternary if channel is None else sum_ternary(channel, ternary, voters)
        each = scalers.repeat_interleave(torch.tensor([g.numel() for g in gradients], device=scalers.device))
        return counts * each

    def _clipped(self, gradient: Tensor) -> Tensor:
        if not self.clip or gradient.numel() < 2:
            return gradient
        bound = self.clip * gradient.std(correction=0)
        return gradient.clamp(-bound, bound)

    @staticmethod
    def _ternary(gradient: Tensor, scaler: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(gradient.shape, generator=generator, device=gradient.device)
        # Strictly below: a gradient of zero is never drawn, and one of the scaler's size always is.
        return torch.where(drawn * scaler < gradient.abs(), torch.sign(gradient), 0).to(torch.int8)

    def options(self) -> dict[str, Any]:
        """Options that must be the same on all ranks, besides hyperparameters."""
        return super().options() | {"clip": self.clip, "seed": self.seed}
