"""How a Trainer clips gradients that stay on their worker: each worker's by its own norm.

Extension points of transformers 5: ``_clip_grad_norm`` and ``_get_grad_norm``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from ..optim.states import all_parameters
from ..optim.tensors import whole
from ..optim.workers import WorkersOptimizer, members_of
from .workers import WorkersMixin


class ClippingMixin(WorkersMixin):
    """Clips each worker's gradient; where gradients are averaged, nothing changes."""

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if not self._gradients_stay_local:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        return self._clip(model, self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and self._gradients_stay_local:
            grad_norm = self._clip(model, math.inf)
        return super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]

    def _clip(self, model: nn.Module, limit: float) -> torch.Tensor:
        """Returns the norm; where it is not finite, gradients stay as they are, and the bad one can be found."""
        self.accelerator.unscale_gradients()
        if self._has_virtual_workers():
            return self._clip_each(model, limit)
        [worker] = members_of(self.optimizer)
        return self._clip_own(model, limit, worker)

    def _clip_each(self, model: nn.Module, limit: float) -> torch.Tensor:
        """Of each virtual worker, by its own norm; returns the mean of these."""
        optimizer, norms = self._own_optimizer(), []
        for worker, gradients in zip(optimizer.members, optimizer.gradients, strict=False):
            for parameter, gradient in zip(all_parameters(optimizer), gradients, strict=True):
                parameter.grad = gradient
            norms.append(self._clip_own(model, limit, worker))
        for parameter in all_parameters(optimizer):
            parameter.grad = None
        return torch.stack(norms).mean()

    def _clip_own(self, model: nn.Module, limit: float, worker: WorkersOptimizer) -> torch.Tensor:
        parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = whole(get_total_norm(gradients))
        # Votes may be on their way: gradients that are short enough are not multiplied by 1. On a GPU, which would have
        # to be waited for, that goes for no limit only.
        if limit < math.inf and (norm.device.type != "cpu" or limit < norm + 1e-6 < math.inf):
            clip_grads_with_norm_(parameters, limit, torch.where(norm.isfinite(), norm, 0.0))
        if not self._callbacks_before_step:
            worker.agreement.known_finite.note_norm(gradients, norm)
        return norm
