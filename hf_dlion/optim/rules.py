"""The rules that turn an averaged gradient into an update: SGD with momentum, AdamW, Lion.

SGD and AdamW are torch's own functions, with torch's meaning of weight decay: added to the gradient in SGD, decoupled
in AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rule:
    """How an update is made.

    Attributes:
        state_names: keys of the state of a parameter.
        hyperparameters: names of those that it uses, besides lr and weight_decay.
        apply: takes float32 parameters to change, their gradients and states, and the param group.
    """

    state_names: tuple[str, ...]
    hyperparameters: tuple[str, ...]
    apply: Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[State], dict[str, Any]], None]


def _sgd(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State], group: dict[str, Any]
) -> None:
    sgd(
        list(parameters),
        list(gradients),
        [state.get("momentum_buffer") for state in states],  # none where there is no momentum
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        lr=float(group["lr"]),
        dampening=0.0,
        nesterov=group.get("nesterov", False),
        maximize=False,
    )


def _adamw(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State], group: dict[str, Any]
) -> None:
    adamw(
        list(parameters),
        list(gradients),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [torch.tensor(float(group["step"]), dtype=torch.float32) for _ in parameters],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def _lion(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[State], group: dict[str, Any]
) -> None:
    beta1, beta2 = group["betas"]
    for parameter, gradient, state in zip(parameters, gradients, states, strict=True):
        momentum = state["momentum"]
        decision = torch.sign(beta1 * momentum + (1 - beta1) * gradient)
        momentum.copy_(beta2 * momentum + (1 - beta2) * gradient)
        parameter.sub_(float(group["lr"]) * (decision + group["weight_decay"] * parameter))


RULES = {
    "sgd": Rule(("momentum_buffer",), ("momentum",), _sgd),
    "adamw": Rule(("exp_avg", "exp_avg_sq"), ("betas", "eps"), _adamw),
    "lion": Rule(("momentum",), ("betas",), _lion),
}
