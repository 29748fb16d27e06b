"""What the theory of Lion watches, as a callback.

Lion with weight decay minimizes f(x) in the box ``|weight_decay * x| <= 1`` (Chen et al., 2023, arXiv 2310.05898), and
so does Distributed Lion (arXiv 2404.00438, section 4): first x falls into the box, then it goes to a stationary point
inside. Extension points of transformers 5: ``on_train_begin`` and ``on_pre_optimizer_step``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim.sharding import find_shards
from ..optim.states import all_parameters
from ..optim.tensors import local
from ..optim.workers import members_of
from ..wire.conversation import run
from ..wire.groups import make_channel
from ..wire.ledger import Ledger
from ..wire.sums import sum_dense
from .methods import METHODS


class LionTheoryCallback(TrainerCallback):
    """Measures where Lion stands between its two phases.

    With lambda the weight decay of a parameter's group, and x and the gradients as they stand before the update of
    every ``every``-th step:

    - ``lion_box_distance``: the Euclidean distance of lambda * x from the box [-1, 1]^d, over all parameters. With
      lr * lambda <= 1, each step multiplies it by at most 1 - lr * lambda (the smallest of the groups' that decay),
      whatever the votes, to within rounding. A group with lambda = 0 has no box and adds nothing.
    - ``lion_surrogate``: S = <g, sign(g) + lambda * x>, where g is the mean of the workers' gradients. Inside the box
      every term is at least 0, and S is 0 only at a stationary point of the constrained problem. It is a sum over
      parameters, between 0 and twice the 1-norm of g there, so compare it within a run and not between models.

    The gradients are those that the optimizer gets: of this step's batches, noise included, each worker's clipped by
    ``max_grad_norm``. On noisy gradients S levels off above 0, and so it may under votes of workers whose data differ.

    ``DLionTrainer``, and any Trainer with ``DLionTrainerMixin``, puts both into its next training log. Another Trainer
    logs nothing of this. An observation averages the gradients densely, one parameter after the other: 64 bits per
    parameter sent by each worker at most, not entered in the ledger, and memory for a few copies of the largest
    parameter.

    For Lion by vote or on the mean, and for Signum, which is Lion with equal betas: the same box and the same
    stationary points.

    Args:
        every: optimizer steps between observations.

    Raises:
        ValueError: ``every`` is below 1; or, as training begins, the optimizer is none of these.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every={every}: it is the number of steps from one observation to the next, at least 1.")
        self.every = every
        self._found: dict[str, float] = {}

    def observations(self) -> dict[str, float]:
        """The last observation, once: empty if there was none since the last call."""
        found, self._found = self._found, {}
        return found

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that the optimizer is a Lion."""
        self._found = {}
        optimizer = _unwrapped(kwargs["optimizer"])
        worker = next(iter(members_of(optimizer)), optimizer)
        if not getattr(worker, "bounded_by_decay", False):
            names = [name for name, method in METHODS.items() if method.optimizer.bounded_by_decay]
            raise ValueError(
                f"LionTheoryCallback was given a run of {type(worker).__name__}, which does not solve Lion's "
                f"constrained problem. Take it out, or train with optim= one of {', '.join(names)}."
            )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Observe. A collective over the workers."""
        if (state.global_step + 1) % self.every == 0:
            self._found = _observe(_unwrapped(kwargs["optimizer"]))


@torch.no_grad()
def _observe(optimizer: Any) -> dict[str, float]:
    """Of an optimizer of this package."""
    weight_decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
    sums = []
    for index, (parameter, decay) in enumerate(zip(all_parameters(optimizer), weight_decays, strict=True)):
        scaled = decay * local(parameter).float()
        gradient = _mean_gradient(optimizer, local(parameter), index)
        # Not as two sums, whose difference would be rounding where the terms are small.
        surrogate = gradient.sign().add_(scaled).mul_(gradient).sum()
        square = scaled.abs_().sub_(1).relu_().square_().sum()
        sums.append(torch.stack([square, surrogate]))
    squares, surrogates = torch.stack(sums).T.tolist()  # the only wait for the device
    square, surrogate = sum(squares), sum(surrogates)
    worker = optimizer.members[0]
    if (shards := find_shards(all_parameters(worker), worker.process_group)) is not None:
        own = torch.tensor([square, surrogate], dtype=torch.float64, device=sums[0].device)
        square, surrogate = shards.sum(own).tolist()
    return {"lion_box_distance": math.sqrt(square), "lion_surrogate": surrogate}


def _mean_gradient(optimizer: Any, parameter: Tensor, index: int) -> Tensor:
    """The mean over the workers, float32 of the parameter's shape; a worker without a gradient counts as zero."""
    total = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    for gradients in optimizer.gradients:
        if (own := gradients[index]) is not None:
            total += local(own)
    worker = optimizer.members[0]
    if worker.workers > len(optimizer.members) and parameter.numel():
        channel = make_channel(worker.process_group, Ledger())
        assert channel is not None
        total = run(sum_dense(channel, total.view(-1), range(channel.size))).view(parameter.shape)
    return total / worker.workers


def _unwrapped(optimizer: Any) -> Any:
    return getattr(optimizer, "optimizer", optimizer)
