"""Virtual workers: N workers of any method inside one process, for studies without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..bits.hashing import digest
from ..wire.ledger import Ledger
from ..wire.local import LocalGroup, LocalWorker
from ..wire.shares import VoteShares
from .replica import STEP, layout_of
from .states import all_parameters, copyable
from .tensors import local
from .workers import WorkersOptimizer, check_known

ADVERSARIES = ("flip", "random")

_NOT_SHARED = ("params", "param_names", STEP)


class VirtualWorkers(Optimizer):
    """N workers that take turns with one model, each with the method's own optimizer, state and code on the wire.

    ::

        optimizer = VirtualWorkers(model.parameters(), 8, DistributedLion, lr=1e-4)
        for batches in loader:                 # one batch for each worker
            for batch in batches:
                loss(model, batch).backward()
                optimizer.next_worker()        # takes the gradients as those of the next worker, and clears them
            optimizer.step()                   # the exchange among all of them, and the update

    The parameters are bit for bit those that N processes would have, and ``ledger`` has the bytes that each of them
    would send. Every worker holds its own copy of the parameters, their gradients and its state: N times the memory
    of one. A worker that had no turn before a step has no gradients in it. With :class:`LocalSteps
    <hf_dlion.optim.local_steps.LocalSteps>` the workers' parameters differ between votes: in each one's turn the model
    has its own, and else the first one's.

    Args:
        params: parameters, named parameters or param groups of the model.
        workers: N.
        method: makes the optimizer of one worker: a class of ``hf_dlion.trainer.methods.METHODS``.
        adversaries: how many workers, the last ones, send what is not theirs.
        adversary: ``"flip"``: a gradient's negative; or ``"random"``: its magnitudes under random signs.
        options: keyword arguments of ``method``.

    Raises:
        ValueError: fewer than two workers, more adversaries than workers, an unknown kind of adversary, or what
            ``method`` raises.
    """

    def __init__(
        self,
        params: Iterable[Any],
        workers: int,
        method: Callable[..., WorkersOptimizer],
        *,
        adversaries: int = 0,
        adversary: str = "flip",
        **options: Any,
    ) -> None:
        if workers < 2:
            raise ValueError(f"workers={workers}: virtual workers are at least 2; one worker is the method itself.")
        if not 0 <= adversaries <= workers:
            raise ValueError(f"adversaries={adversaries} of {workers} workers: it is a number from 0 to {workers}.")
        check_known("adversary", adversary, ADVERSARIES)
        self.members: list[WorkersOptimizer] = []
        super().__init__(params, {})
        self.workers = workers
        self._honest = workers - adversaries
        self._adversary = adversary
        self._group = LocalGroup(workers)
        for rank in range(workers):
            groups = [_copied(group, clone=rank > 0) for group in self.param_groups]
            self.members.append(method(groups, process_group=LocalWorker(self._group, rank), **options))
        self.param_groups = self.members[0].param_groups
        self.defaults = self.members[0].defaults
        self._turns: list[list[Tensor | None]] = []
        self._in_place = 0

    @property
    def ledger(self) -> Ledger:
        """What the first worker would have sent and received."""
        return self.members[0].ledger

    @property
    def bad_gradients(self) -> int:
        """Workers left out of a step for a bad gradient, over all steps."""
        return self.members[0].bad_gradients

    abstentions = bad_gradients  # its former name

    @property
    def gradients(self) -> list[list[Tensor | None]]:
        """By worker that has had its turn, its gradients, by parameter; until the step."""
        return self._turns

    def __getstate__(self) -> dict[str, Any]:
        return copyable(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with a state of zeros."""
        if not self.members:
            super().add_param_group(param_group)
            return
        first, *others = self.members
        first.add_param_group(param_group)
        for member in others:
            member.add_param_group(_copied(first.param_groups[-1], clone=True))

    def next_worker(self) -> None:
        """Take the gradients, after a backward, as those of the next worker, and clear them.

        Raises:
            RuntimeError: all workers have had their turn.
        """
        rank = len(self._turns)
        if rank == self.workers:
            raise RuntimeError(f"all {rank} workers have had their turn. Call step() before the next one's.")
        self.take_turn(rank)

    @torch.no_grad()
    def take_turn(self, rank: int) -> None:
        """Take the gradients, after a backward, as those of this worker, added to those it has, and clear them.

        Args:
            rank: of the worker: one that had its turn since the last step, or the next.
        """
        parameters = all_parameters(self)
        gradients = [parameter.grad for parameter in parameters]
        if rank >= self._honest:
            generator = torch.Generator(parameters[0].device)
            generator.manual_seed(digest((rank, self.param_groups[0][STEP])))
            gradients = [None if g is None else self._tampered(g, generator) for g in gradients]
        if rank == len(self._turns):
            self._turns.append(gradients)
        else:
            before = self._turns[rank]
            self._turns[rank] = [_sum(one, other) for one, other in zip(before, gradients, strict=True)]
        for parameter in parameters:
            parameter.grad = None
        self._put_in_place((rank + 1) % self.workers)

    def forget_turns(self) -> None:
        """Drop the gradients taken since the last step."""
        self._turns = []
        self._put_in_place(0)

    @torch.no_grad()
    def vote(self) -> None:
        """As :meth:`LocalSteps.vote <hf_dlion.optim.local_steps.LocalSteps.vote>`, of all workers."""
        self._put_in_place(0)
        self._follow_first()
        self._group.run(lambda rank: self.members[rank].vote())

    @contextmanager
    def voted_parameters(self) -> Iterator[None]:
        """As :meth:`WorkersOptimizer.voted_parameters`; between two steps."""
        self._put_in_place(0)
        with self.members[0].voted_parameters():
            yield

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """The exchange among all workers, and the update.

        Args:
            closure: None; a loss cannot be computed again for all workers at once.

        Raises:
            RuntimeError: there are gradients that no worker has taken; or as the method's ``step``.
            FloatingPointError: as the method's ``step``.
        """
        if closure is not None:
            raise ValueError("a closure was given, but virtual workers have taken their gradients before the step.")
        if any(parameter.grad is not None for parameter in all_parameters(self)):
            raise RuntimeError(
                "there are gradients that no virtual worker has taken. Call next_worker() after each worker's backward."
            )
        self._put_in_place(0)
        self._follow_first()
        nothing: list[Tensor | None] = [None] * len(all_parameters(self))
        turns, self._turns = self._turns, []
        for rank, member in enumerate(self.members):
            gradients = turns[rank] if rank < len(turns) else nothing
            for parameter, gradient in zip(all_parameters(member), gradients, strict=True):
                parameter.grad = gradient
        try:
            self._group.run(lambda rank: self.members[rank].step())
        finally:
            for member in self.members:
                member.zero_grad()

    def vote_shares(self) -> VoteShares | None:
        """As :meth:`WorkersOptimizer.vote_shares`."""
        return self._group.run(lambda rank: self.members[rank].vote_shares())[0]

    def state_dict(self) -> dict[str, Any]:
        """The state of every worker, and the param groups."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        workers = [member.state_dict() for member in self.members]
        state: dict[str, Any] = {"state": {}, "param_groups": workers[0]["param_groups"], "workers": workers}
        for after in self._optimizer_state_dict_post_hooks.values():
            state = after(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave.

        Raises:
            ValueError: it is of another number of workers, or does not fit the parameters.
        """
        state_dict = state_dict.copy()
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        found = state_dict.get("workers", ())
        if len(found) != self.workers:
            raise ValueError(
                f"this state is of {len(found) or 'no'} virtual workers, and here are {self.workers}. Go on with as "
                "many as it was written by."
            )
        for member, own in zip(self.members, found, strict=True):
            member.load_state_dict(own)
        self.param_groups = self.members[0].param_groups
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _follow_first(self) -> None:
        """Take over what was set or changed in the model and the param groups, which are the first worker's."""
        first, *others = self.members
        sizes = [len(group["params"]) for group in first.param_groups]
        for member in others:
            if (held := [len(group["params"]) for group in member.param_groups]) != sizes:
                raise ValueError(
                    f"the param groups of virtual workers have {sizes} parameters, and had {held}: which ones were "
                    "taken out cannot be known of the copies. Freeze them instead: requires_grad_(False)."
                )
            for group, shared in zip(member.param_groups, first.param_groups, strict=True):
                group.update({name: value for name, value in shared.items() if name not in _NOT_SHARED})
            _follow(member, all_parameters(first))

    def _put_in_place(self, rank: int) -> None:
        """Let the model have the parameters of that worker, where they are its own."""
        rank = rank if self.members[rank].between_votes else 0
        if self._in_place:
            self._swap(self._in_place)
        if rank:
            _follow(self.members[rank], all_parameters(self))
            self._swap(rank)
        self._in_place = rank

    def _swap(self, rank: int) -> None:
        for own, parameter in zip(all_parameters(self.members[rank]), all_parameters(self), strict=True):
            own.data, parameter.data = parameter.data, own.data

    def _tampered(self, gradient: Tensor, generator: torch.Generator) -> Tensor:
        if self._adversary == "flip":
            return -gradient
        heads = torch.rand(gradient.shape, generator=generator, dtype=torch.float32, device=gradient.device) < 0.5
        return torch.where(heads, gradient, -gradient)


def _follow(member: WorkersOptimizer, parameters: list[Tensor]) -> None:
    """Resized, converted, moved or set to other values, as the model was since the last step."""
    pairs = list(zip(all_parameters(member), parameters, strict=True))
    alike = [layout_of([own]) == layout_of([parameter]) for own, parameter in pairs]
    for (own, parameter), same in zip(pairs, alike, strict=True):
        if not same:
            kept = own if member.between_votes and own.shape == parameter.shape else parameter
            own.data = torch.empty_like(parameter).copy_(kept)
    if not member.between_votes and any(alike):
        held, given = zip(*(pair for pair, same in zip(pairs, alike, strict=True) if same), strict=True)
        torch._foreach_copy_([local(one) for one in held], [local(one) for one in given])


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Of two gradients; in place, as backward adds."""
    return other if one is None else one if other is None else one.add_(other)


def _clone(parameter: Tensor) -> Tensor:
    return parameter.detach().clone().requires_grad_(parameter.requires_grad)


def _copied(group: dict[str, Any], clone: bool) -> dict[str, Any]:
    params = [_clone(parameter) if clone else parameter for parameter in group["params"]]
    names = group.get("param_names")
    rest = {name: value for name, value in group.items() if name not in _NOT_SHARED}
    return {**rest, "params": params if names is None else list(zip(names, params, strict=True))}
