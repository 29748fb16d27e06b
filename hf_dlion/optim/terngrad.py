"""TernGrad (Wen et al., NeurIPS 2017, arXiv 1705.07878, Algorithm 1 with its section 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from ..bits.hashing import digest
from ..wire.collectives import Channel
from ..wire.conversation import Conversation
from ..wire.sums import sum_ternary
from .agreement import StepInputs
from .mean_gradient import MeanGradient, RuleOptions, Share
from .workers import check_range


@dataclass(frozen=True)
class _Draw:
    """What a step draws with.

    Attributes:
        bounds: float32, a parameter, to which this worker clips.
        scalers: float32, a parameter, the largest entry of all workers.
        generator: of the random numbers.
    """

    bounds: Tensor
    scalers: Tensor
    generator: torch.Generator

    def ternary(self, gradient: Tensor, parameter: int) -> Tensor:
        """A part of a parameter's gradient as -1, 0 or 1, int8."""
        clipped = gradient.clamp(-self.bounds[parameter], self.bounds[parameter])
        drawn = torch.rand(clipped.shape, generator=self.generator, dtype=torch.float32, device=clipped.device)
        # Strictly below: a gradient of zero is never drawn, and one of the scaler's size always is.
        hits = drawn.mul_(self.scalers[parameter]) < clipped.abs()
        return torch.where(hits, torch.sign(clipped), 0).to(torch.int8)


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
        options: as in :class:`MeanGradient`.
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
        **options: Unpack[RuleOptions],
    ) -> None:
        check_range("clip", clip, "it is a number of standard deviations, or 0.")
        self.clip = clip
        self.seed = seed
        super().__init__(params, lr, weight_decay, momentum=momentum, **options)

    @override
    def _prepare(self, channel: Channel | None, voters: Sequence[int], inputs: StepInputs) -> _Draw:
        device = inputs.replica.parameters[0].device
        bounds = torch.stack([self._bound(gradient, device) for gradient in inputs.gradients])
        scalers = torch.stack([_largest(gradient, device) for gradient in inputs.gradients]).minimum(bounds)
        if channel is not None:
            everyone, work = channel.all_gather(scalers)
            work.wait()
            scalers = everyone[list(voters)].amax(0)
        generator = torch.Generator(device)
        generator.manual_seed(digest((self.seed, channel.rank if channel else 0, inputs.step)))
        return _Draw(bounds, scalers, generator)

    @override
    def _sum(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        draw: _Draw = share.shared
        parameters = [span.parameter for span in share.spans]
        scalers = draw.scalers[parameters]
        pairs = zip(share.gradients, parameters, strict=True)
        ternary = torch.cat([draw.ternary(gradient, parameter) for gradient, parameter in pairs])
        counts: Tensor = ternary if channel is None else (yield from sum_ternary(channel, ternary, voters))
        lengths = torch.tensor([span.length for span in share.spans], device=scalers.device)
        return counts * scalers.repeat_interleave(lengths)

    def _bound(self, gradient: Tensor | None, device: torch.device) -> Tensor:
        if not self.clip or gradient is None or gradient.numel() < 2:
            return torch.full((), torch.inf, dtype=torch.float32, device=device)
        return self.clip * gradient.float().std(correction=0)

    @override
    def options(self) -> dict[str, Any]:
        return super().options() | {"clip": self.clip, "seed": self.seed}


def _largest(gradient: Tensor | None, device: torch.device) -> Tensor:
    """The largest magnitude; 0 where there is nothing."""
    if gradient is None or not gradient.numel():
        return torch.zeros((), dtype=torch.float32, device=device)
    smallest, largest = gradient.aminmax()
    return torch.maximum(-smallest, largest).float()
