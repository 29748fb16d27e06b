"""Distributed Lion (Liu et al., NeurIPS 2024, arXiv 2404.00438, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from ..wire.collectives import Channel
from ..wire.exchange import AGGREGATIONS, EXCHANGES, TIES, Exchange, make_exchange, top_level
from ..wire.ledger import Ledger
from .agreement import Note, Opening, checksum, differing, digest, exchange_openings, first_bad_gradient
from .kernels import EAGER, Kernels, compile_kernels
from .layout import Bucket, make_buckets, memory_order
from .passes import Passes

MOMENTUM = "momentum"
STEP = "step"

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
    layout: int
    kernels: Kernels | None
    exchange: Exchange | None
    passes: Passes | None = None
    opened: bool = False


class DistributedLion(Optimizer):
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
    and float16 parameters are updated in float32 and rounded to nearest.

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
        process_group: the workers; None is the default group.

    Raises:
        ValueError: an argument out of its range; a parameter that is sparse, complex or not dense in memory, or on
            another device than the first.
    """

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
        process_group: dist.ProcessGroup | None = None,
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
        self.process_group = process_group
        self.ledger = Ledger()
        self._plan: _Plan | None = None
        self._checking_gradients = True
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, STEP: 0})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with momenta of zero. On all ranks alike, between two steps."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group[STEP] = self.param_groups[0][STEP]
        try:
            _check_hyperparameters(group)
            for parameter in group["params"]:
                _check_parameter(parameter, self.param_groups[0]["params"][0].device)
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in group["params"]:
            self.state[parameter][MOMENTUM] = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
        self._plan = None

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, of this worker. The momentum stays float32.

        Raises:
            ValueError: the param groups do not fit, or a momentum is missing or of another shape; nothing was loaded.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        momenta = []
        for index, parameter in zip(saved, self._all_parameters(), strict=False):
            momentum = state_dict["state"].get(index, {}).get(MOMENTUM)
            if momentum is None or momentum.shape != parameter.shape:
                found = "there is none" if momentum is None else f"it has shape {tuple(momentum.shape)}"
                raise ValueError(
                    f"no {MOMENTUM} of shape {tuple(parameter.shape)} for parameter {index}: {found}. This state is of "
                    "another model or optimizer."
                )
            momenta.append(torch.empty_like(parameter, dtype=torch.float32, requires_grad=False).copy_(momentum))
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of its parameter; ours keeps its own.
        for parameter, momentum in zip(self._all_parameters(), momenta, strict=True):
            self.state[parameter] = {MOMENTUM: momentum}
        self._plan = None

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
            FloatingPointError: a gradient has a NaN or Inf on some rank; raised on all ranks.
            RuntimeError: the ranks do not fit together (parameters, options, hyperparameters or steps differ), or all
                have the same gradients at the first step; raised on all ranks. Or a gradient is sparse.

            No parameter has changed then; momenta may have.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plan = self._current_plan()
        gradients = [_gradient(parameter) for parameter in plan.parameters]
        bad = first_bad_gradient(gradients)
        hypers = [_hyper(group, plan.device) for group in self.param_groups]
        passes = self._current_passes(plan)
        if plan.exchange is None:
            if bad >= 0:
                raise FloatingPointError(self._describe_bad(plan, bad))
            each = (h for group, h in zip(self.param_groups, hypers, strict=True) for _ in group["params"])
            passes.alone(plan.kernels or EAGER, gradients, each)
        else:
            channel = plan.exchange.channel
            if not plan.opened or self._checking_gradients:
                self._open(plan, channel, gradients)
            note = Note(digest(self._describe_settings()), bad).pack(plan.device)
            passes.vote_and_apply(
                plan.exchange,
                plan.kernels or EAGER,
                gradients,
                hypers,
                self.param_groups[0][STEP],
                note,
                lambda notes: self._check_notes(plan, channel, Note.unpack(notes)),
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

    @property
    def workers(self) -> int:
        """N, the number of workers that vote; 1 without a process group.

        Raises:
            RuntimeError: this rank is not in ``process_group``.
        """
        if self.process_group is None and not (dist.is_available() and dist.is_initialized()):
            return 1
        size = dist.get_world_size(self.process_group)
        if size < 1:
            raise RuntimeError(
                f"rank {dist.get_rank()} is not in the process_group that its optimizer was given, so it cannot vote "
                "there. Give each rank the group that it is a member of."
            )
        return size

    def _all_parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _current_plan(self) -> _Plan:
        if self._plan is None or self._plan.workers != self.workers:
            self._plan = self._make_plan(self.workers)
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
            channel = Channel(self.process_group, self.ledger)
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
            layout=digest(self._describe_layout()),
            kernels=kernels,
            exchange=exchange,
        )

    def _open(self, plan: _Plan, channel: Channel, gradients: list[Tensor | None]) -> None:
        """Before the first vote: find out, on all ranks alike, whether they fit together and what all can run."""
        opening = Opening(
            plan.layout,
            int(plan.kernels is not None),
            checksum(plan.parameters),
            checksum([g for g in gradients if g is not None]),
        )
        openings = exchange_openings(channel, opening, plan.device)
        if any(other.layout != opening.layout for other in openings):
            raise RuntimeError(
                f"the ranks do not optimize the same parameters in the same way: "
                f"{differing(channel, self._describe_layout())}. Build model and optimizer alike on every rank."
            )
        if any(other.parameters != opening.parameters for other in openings):
            raise RuntimeError(
                "the parameters differ between the ranks before the first step, so the replicas would never be the "
                "same. Wrap the model in DistributedDataParallel (accelerator.prepare does), which sends rank 0's "
                "parameters to all, or load the same weights on every rank."
            )
        if self._checking_gradients and any(other.gradients for other in openings):
            if all(other.gradients == opening.gradients for other in openings):
                raise RuntimeError(
                    f"all {plan.workers} workers have exactly the same gradients, so their votes say nothing. Either "
                    "the gradients were averaged before the step (DDP still all-reduces: call "
                    "hf_dlion.keep_gradients_local before accelerator.prepare, or use DLionTrainer), or every worker "
                    "was given the same data (shard the data loader: accelerator.prepare does)."
                )
            self._checking_gradients = False
        if not all(other.compiled for other in openings):
            plan.kernels = None
        plan.opened = True

    def _check_notes(self, plan: _Plan, channel: Channel, notes: list[Note]) -> None:
        if any(note.settings != notes[0].settings for note in notes):
            raise RuntimeError(
                f"the ranks have different hyperparameters: {differing(channel, self._describe_settings())}. "
                "Set them, and step the scheduler, alike on every rank."
            )
        for rank, note in enumerate(notes):
            if note.bad_gradient >= 0:
                raise FloatingPointError(f"rank {rank}: {self._describe_bad(plan, note.bad_gradient)}")

    def _describe_layout(self) -> dict[str, Any]:
        described: dict[str, Any] = {
            "aggregation": self.aggregation,
            "tie": self.tie,
            "exchange": self.exchange,
            "the number of param groups": len(self.param_groups),
        }
        for index, parameter in enumerate(self._all_parameters()):
            described[f"parameter {index}"] = (
                f"{str(parameter.dtype).removeprefix('torch.')} {tuple(parameter.shape)}, strides {parameter.stride()}"
            )
        described |= {f"the size of param group {i}": len(g["params"]) for i, g in enumerate(self.param_groups)}
        return described

    def _describe_settings(self) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for index, group in enumerate(self.param_groups):
            for name in (STEP, "lr", "betas", "weight_decay"):
                value = group[name]
                described[f"{name} of param group {index}"] = float(value) if isinstance(value, Tensor) else value
        return described

    def _describe_bad(self, plan: _Plan, index: int) -> str:
        names = [name for group in self.param_groups for name in group.get("param_names", ())]
        name = f" ({names[index]})" if len(names) == len(plan.parameters) else ""
        return (
            f"the gradient of parameter {index}{name}, shape {tuple(plan.parameters[index].shape)}, has a NaN or Inf "
            f"at step {self.param_groups[0][STEP]}. No parameter was updated. Look for a too large learning rate, a "
            "division by zero in the loss, or a batch without targets."
        )


def _gradient(parameter: Tensor) -> Tensor | None:
    gradient = parameter.grad
    if gradient is not None and gradient.layout != torch.strided:
        raise RuntimeError(
            f"a gradient of layout {gradient.layout} (parameter of shape {tuple(parameter.shape)}): DistributedLion "
            "votes on every element. Use dense gradients, as nn.Embedding(sparse=False) gives."
        )
    return gradient


def _hyper(group: dict[str, Any], device: torch.device) -> Tensor:
    """The float32 tensor that the kernels take."""
    beta1, beta2 = group["betas"]
    values = [beta1, 1 - beta1, beta2, 1 - beta2, float(group["lr"]), group["weight_decay"]]
    return torch.tensor(values, dtype=torch.float32, device=device)


def _check_hyperparameters(group: dict[str, Any]) -> None:
    if not float(group["lr"]) >= 0:
        raise ValueError(f"lr={group['lr']}: the learning rate cannot be negative.")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas={group['betas']}: there are two, each at least 0 and less than 1.")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']}: it cannot be negative.")


def _check_parameter(parameter: Tensor, device: torch.device) -> None:
    if parameter.layout != torch.strided or not parameter.is_floating_point():
        raise ValueError(
            f"a parameter of dtype {parameter.dtype}, layout {parameter.layout}, shape {tuple(parameter.shape)}: the "
            "sign of an update is defined for dense, real floating-point parameters. Leave others out of the optimizer."
        )
    if parameter.device != device:
        raise ValueError(
            f"parameters on {device} and on {parameter.device}: one worker holds all its parameters on one device. "
            "Models spread over devices are not supported; use more workers, or LoRA."
        )
    memory_order(parameter)
