"""Distributed Lion (Liu et al., NeurIPS 2024, arXiv 2404.00438, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..wire.exchange import AGGREGATIONS, EXCHANGES, TIES, Exchange, make_exchange, top_level
from .agreement import Note
from .kernels import EAGER, Kernels, compile_kernels
from .layout import Bucket, make_buckets, memory_order
from .passes import Passes
from .workers import STEP, WorkersOptimizer, WorkersOptions, check_betas

MOMENTUM = "momentum"

COMPILE_FROM = 1 << 22
"""Parameters from which on compiling, some 10 seconds once, pays."""


@dataclass(frozen=True)
class VoteShares:
    """How the votes went since they were last asked for, over all workers.

    Attributes:
        ties: share of the parameters on which the votes were split evenly; 0 for N odd.
        unanimous: share of the parameters on which all workers agreed.
    """

    ties: float
    unanimous: float


@dataclass
class _Plan:
    """What stays the same from step to step."""

    workers: int
    device: torch.device
    parameters: list[Tensor]
    buckets: list[Bucket]
    kernels: Kernels | None
    exchange: Exchange | None
    passes: Passes | None = None


class DistributedLion(WorkersOptimizer):
    """Lion whose workers send signs: every worker keeps its own momentum, and a vote decides the update.

    With worker i's momentum m_i and its own, unreduced gradient g_i::

        u_i = beta1 * m_i + (1 - beta1) * g_i
        d_i = sign(u_i)                                    # 1 bit a parameter: what travels
        m_i = beta2 * m_i + (1 - beta2) * g_i
        D   = sign(sum_i d_i)  or  (1/N) * sum_i d_i       # aggregation "mavo" or "avg"
        x   = x - lr * (D + weight_decay * x)              # the same on every worker, bit for bit

    The gradients must be each worker's own: under DDP, call :func:`hf_dlion.keep_gradients_local`. With one worker,
    or without a process group, this is Lion (Chen et al., 2023, arXiv 2302.06675), and a parameter without a gradient
    is left alone.

    One bit cannot say zero, so where a worker's u_i is exactly 0 (a token it never met), or where it has no gradient
    at all, its bit alternates over ranks, steps and elements: such votes cancel, and a parameter that no worker has a
    gradient for only decays, to within 2 * lr. A worker without a gradient for a parameter keeps its momentum.

    The state is a float32 momentum for each parameter, of whatever dtype; it differs between the workers. bfloat16
    and float16 parameters are updated in float32. An update of lr is less than half a unit in the last place of most
    bfloat16 parameters, so these are rounded at random, without bias and the same on every rank; float16 to nearest.

    From 4 million parameters on, the passes over the parameters are compiled at the first step, if ``torch.compile``
    works on all ranks. Memory beyond parameters, gradients and momentum is bounded by buckets of 16.8 million
    parameters and does not grow with the model. ``ledger`` counts the bytes that have travelled.

    Args:
        params: parameters, named parameters or param groups; dense, real floating point, on one device.
        lr: learning rate; Lion wants 3 to 10 times less than AdamW.
        betas: the decays of direction and momentum, each in [0, 1).
        weight_decay: decoupled; Lion wants 3 to 10 times more than AdamW.
        aggregation: ``"mavo"``, majority vote, or ``"avg"``, averaging.
        tie: what a majority vote of an even number of workers does where it is split: ``"zero"``, D = 0, the paper's
            sign(0); or ``"alternate"``, a sign that alternates over elements and steps, for one bit less on the way
            back.
        exchange: ``"gather"``, everyone counts all votes, (N-1) bits sent per parameter; ``"sharded"``, each rank
            counts its part, (N-1)/N * (1 + bits of the decision); ``"auto"``, the one that sends less.
        process_group, on_bad_gradient, check_replicas_every: as in :class:`hf_dlion.optim.workers.WorkersOptimizer`.

    Raises:
        ValueError: an argument out of its range; a parameter that is sparse, complex or not dense in memory, or on
            another device than the first.
    """

    _state_format = torch.preserve_format  # the passes read momenta in the memory order of their parameters

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        aggregation: str = "mavo",
        tie: str = "zero",
        exchange: str = "auto",
        **workers: Unpack[WorkersOptions],
    ) -> None:
        for name, given, known in (
            ("aggregation", aggregation, AGGREGATIONS),
            ("tie", tie, TIES),
            ("exchange", exchange, EXCHANGES),
        ):
            if given not in known:
                raise ValueError(f"{name}={given!r} is not known; it is one of {', '.join(map(repr, known))}.")
        self.aggregation = aggregation
        self.tie = tie
        self.exchange = exchange
        self._plan: _Plan | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, (), (MOMENTUM,), **workers)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Vote and update. A collective over the workers.

        Args:
            closure: computes the loss again and returns it.

        Raises:
            FloatingPointError: all ranks have a NaN or Inf in a gradient, or one has with ``on_bad_gradient="raise"``;
                raised on all ranks.
            RuntimeError: the ranks do not fit together (parameters, options, hyperparameters or steps differ), or all
                have the same gradients at the first step; raised on all ranks. Or a gradient is sparse.

            No parameter has changed then; momenta may have.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._current_plan()
        gradients, bad = self._gradients(plan.parameters)
        hypers = [_hyper(group, plan.device) for group in self.param_groups]
        passes = self._current_passes(plan)
        if plan.exchange is None:
            self._check_alone(bad)
            each = (h for group, h in zip(self.param_groups, hypers, strict=True) for _ in group["params"])
            passes.alone(plan.kernels or EAGER, gradients, each, self.param_groups[0][STEP])
        else:
            channel = plan.exchange.channel
            if (not self.opened or self._checking_gradients) and not self._open(
                channel, plan.parameters, gradients, plan.kernels is not None
            ):
                plan.kernels = None
            passes.vote_and_apply(
                plan.exchange,
                plan.kernels or EAGER,
                gradients,
                hypers,
                self.param_groups[0][STEP],
                self._note(bad, plan.parameters),
                lambda notes: self._voters(channel, Note.unpack(notes)),
            )
        for group in self.param_groups:
            group[STEP] += 1
        self.ledger.steps += 1
        return loss

    def vote_shares(self) -> VoteShares | None:
        """How the votes went since the last call. A collective over the workers; None with one worker."""
        plan = self._plan
        if plan is None or plan.exchange is None:
            return None
        seen = plan.exchange.statistics
        mine = [int(seen.ties), int(seen.unanimous), seen.counted, round(seen.padding)]
        seen.reset()
        rows = plan.exchange.channel.gather_integers(mine, plan.device)
        ties, unanimous, counted, padding = (sum(column) for column in zip(*rows, strict=True))
        votes = max(counted - padding, 1)
        # Votes on padding are zero votes: ties for N even, split for N odd, and never unanimous.
        return VoteShares((ties - padding) / votes if plan.workers % 2 == 0 else 0.0, unanimous / votes)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ValueError where a hyperparameter is out of its range."""
        super().check_group(group)
        check_betas(group["betas"])

    def state_changed(self) -> None:
        """To be called when parameters or state have been changed, or replaced, from outside."""
        super().state_changed()
        self._plan = None

    def options(self) -> dict[str, Any]:
        """Options that must be the same on all ranks, besides hyperparameters."""
        return super().options() | {"aggregation": self.aggregation, "tie": self.tie, "exchange": self.exchange}

    def settings(self) -> tuple[str, ...]:
        """Names of the hyperparameters that must be the same on all ranks at every step."""
        return "lr", "betas", "weight_decay"

    def _current_plan(self) -> _Plan:
        if self._plan is None or self._plan.workers != self.workers:
            self._plan = self._make_plan(self.workers)
            self.opened = False
        return self._plan

    def _current_passes(self, plan: _Plan) -> Passes:
        momenta = [self.state[parameter][MOMENTUM] for parameter in plan.parameters]
        if plan.passes is None or not plan.passes.still_of(plan.parameters, momenta):
            orders = [memory_order(parameter) for parameter in plan.parameters]
            plan.passes = Passes(plan.parameters, momenta, orders, plan.buckets)
        return plan.passes

    def _make_plan(self, workers: int) -> _Plan:
        parameters = self._all_parameters()
        device = parameters[0].device
        elements = sum(parameter.numel() for parameter in parameters)
        exchange = None
        if workers > 1:
            channel = self._make_channel()
            words = elements // 32
            exchange = make_exchange(self.exchange, channel, words, self.aggregation, self.tie, device)
        numbers = iter(range(len(parameters)))
        groups = [[(next(numbers), parameter) for parameter in group["params"]] for group in self.param_groups]
        kernels = None
        if elements >= COMPILE_FROM:
            top = top_level(self.aggregation, self.tie, workers)
            kernels = compile_kernels(device, {parameter.dtype for parameter in parameters}, workers, top)
        return _Plan(
            workers=workers,
            device=device,
            parameters=parameters,
            buckets=make_buckets(groups, exchange.buckets if exchange else 1),
            kernels=kernels,
            exchange=exchange,
        )


def _hyper(group: dict[str, Any], device: torch.device) -> Tensor:
    """The float32 tensor that the kernels take."""
    beta1, beta2 = group["betas"]
    values = [beta1, 1 - beta1, beta2, 1 - beta2, float(group["lr"]), group["weight_decay"]]
    return torch.tensor(values, dtype=torch.float32, device=device)
