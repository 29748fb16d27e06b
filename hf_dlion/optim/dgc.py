"""Deep Gradient Compression (Lin et al., ICLR 2018, arXiv 1712.01887, Algorithm 4)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack, override

from ..wire.collectives import Channel
from ..wire.conversation import Conversation
from .agreement import StepInputs
from .mean_gradient import MeanGradient, RuleOptions, Share
from .replica import STEP
from .sparse import RESIDUAL, sum_largest
from .workers import check_range

VELOCITY = "velocity"


class DeepGradientCompression(MeanGradient):
    """Gradient dropping with a momentum that is corrected for what is dropped.

    For each parameter of worker i, with N workers::

        g_i = g_i * min(1, clip / (sqrt(N) * |g_i|))                           # local clipping, of all parameters
        u_i = momentum * u_i + g_i                                             # momentum correction
        v_i = v_i + u_i
        s_i = v_i where |v_i| is among the k largest, else 0                   # what travels: indices and values
        v_i = v_i - s_i;  u_i = 0 where s_i was sent                           # momentum factor masking
        x   = x - lr * 1/N * sum_i s_i

    k is (1 - drop) * d, reached over ``warmup_steps`` from d / 4 by equal factors. With another rule than SGD, which
    has no momentum here, the sum is that rule's gradient.

    Args:
        params, lr, weight_decay: as in :class:`MeanGradient`.
        momentum: of the correction.
        drop: share of the entries that are not sent, in [0, 1). At least one entry of a parameter is.
        warmup_steps: until then, less is dropped.
        clip: of the norm that the mean gradient may have; 0 turns clipping off.
        options: as in :class:`MeanGradient`, but for ``momentum``; the default rule is plain SGD.
    """

    whole_parameters = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.9,
        drop: float = 0.96,
        warmup_steps: int = 0,
        clip: float = 1.0,
        **options: Unpack[RuleOptions],
    ) -> None:
        check_range("drop", drop, "it is a share, at least 0 and less than 1.", below=1)
        check_range("momentum", momentum, "it is a decay, at least 0 and less than 1.", below=1)
        check_range("warmup_steps", warmup_steps, "it is a number of steps, or 0.")
        check_range("clip", clip, "it is a norm, or 0.")
        self.correction = momentum
        self.drop = drop
        self.warmup_steps = warmup_steps
        self.clip = clip
        super().__init__(params, lr, weight_decay, momentum=0.0, local_state=(VELOCITY, RESIDUAL), **options)

    @property
    def kept(self) -> float:
        """The share of the entries that is sent in the next step."""
        final, step = 1 - self.drop, self.param_groups[0][STEP]
        if step >= self.warmup_steps or final >= 0.25:
            return final
        return float(0.25 * (final / 0.25) ** (step / self.warmup_steps))

    @override
    def _prepare(self, channel: Channel | None, voters: Sequence[int], inputs: StepInputs) -> Tensor:
        """The factor of local clipping."""
        zero = torch.zeros((), dtype=torch.float32, device=inputs.replica.parameters[0].device)
        norms = [zero if gradient is None else gradient.float().norm() for gradient in inputs.gradients]
        norm = torch.stack(norms).norm()
        bound = self.clip / self.workers**0.5
        return torch.where(norm > bound, bound / norm, 1.0) if self.clip else torch.ones_like(norm)

    @override
    def _sum(self, channel: Channel | None, voters: Sequence[int], share: Share) -> Conversation[Tensor]:
        for gradient, state in zip(share.gradients, share.states, strict=True):
            state[VELOCITY].mul_(self.correction).add_(gradient * share.shared)
            state[RESIDUAL].add_(state[VELOCITY])
        total, sent = yield from sum_largest(channel, voters, [s[RESIDUAL] for s in share.states], self.kept)
        for state, indices in zip(share.states, sent, strict=True):
            state[VELOCITY][indices] = 0
        return total

    @override
    def options(self) -> dict[str, Any]:
        own = {"momentum": self.correction, "drop": self.drop, "warmup_steps": self.warmup_steps, "clip": self.clip}
        return super().options() | own
