"""What all workers must agree on, so that none waits for the votes of one that stopped.

What does not fit together is known to all ranks at once, and all raise the same error.
"""

from __future__ import annotations

import functools
import logging
import operator
import os
import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..bits.hashing import checksum, digest
from ..wire.collectives import Channel
from ..wire.shards import Shards
from .bad_gradients import KnownFinite, first_bad_gradient, verdict_on
from .replica import Replica

logger = logging.getLogger(__name__)

ON_BAD_GRADIENT = ("abstain", "raise")

CHANGED_GRADIENT = -2
"""In a header for the number of a bad gradient: there is none, but one has changed since its votes were sent."""

_SHOWN = 4
_UNKNOWN = "they differ in a way that their description does not show"
# Of a gradient scaler, steps in a row in which all workers overflow; from 65536, its scale is 6e-8 then.
_MOST_OVERFLOWS = 40


@dataclass(frozen=True)
class StepInputs:
    """What one step works with.

    Attributes:
        replica: as it describes itself.
        gradients: this worker's, flat, in the memory order of the parameters that votes are laid out for; None where
            there is none.
        bad_gradient: index of the first parameter with a NaN or Inf in its gradient; -1 if there is none. This worker
            abstains then, and has no gradients.
        changed: whether the parameters are laid out otherwise than the votes. This worker then has no gradients, and
            learns whether it is so on all ranks.
        verdict: as of ``bad_gradients.verdict_on``, where only the GPU knows ``bad_gradient`` as yet; this worker has
            its gradients then.
    """

    replica: Replica
    gradients: list[Tensor | None]
    bad_gradient: int
    changed: bool = False
    verdict: Tensor | None = None

    @property
    def step(self) -> int:
        """Its number."""
        return self.replica.step


@dataclass(frozen=True)
class Handshake:
    """One rank's part of the round before the first step.

    Attributes:
        layout: digest of the parameter list and of the optimizer's options.
        compiled: 1 if this rank can run the compiled kernels.
        parameters: checksum of the parameters.
        gradients: checksum of the gradients.
    """

    layout: int
    compiled: int
    parameters: int
    gradients: int


@dataclass(frozen=True)
class Header:
    """One rank's part of what travels with the votes.

    Attributes:
        hyperparameters: digest of the step number and of every group's hyperparameters.
        bad_gradient: index of the first parameter with a NaN or Inf in its gradient; -1 if there is none, or
            ``CHANGED_GRADIENT``.
        parameters: checksum of the parameters; 0 where it is not this step's turn to be compared.
        changed: digest of the layout, where it is another one than the votes were laid out for; else 0.
        present: bit i is set where parameter i has a gradient.
    """

    hyperparameters: int
    bad_gradient: int
    parameters: int
    changed: int
    present: int

    def pack(self, parameters: int, device: torch.device) -> Tensor:
        """As int32 ``[H]``: 32 bytes, and a bit for each of so many parameters in whole words of 64."""
        *numbers, present = astuple(self)
        size = 8 * -(-parameters // 64)
        packed = bytearray(struct.pack(f"<{len(numbers)}q", *numbers) + present.to_bytes(size, "little"))
        return torch.frombuffer(packed, dtype=torch.int32).to(device, non_blocking=device.type == "cuda")

    @classmethod
    def unpack(cls, headers: Tensor) -> list[Header]:
        """Everyone's, by rank, from int32 ``[N, H]``."""
        unpacked = []
        for row in headers.cpu().contiguous().numpy():
            hyperparameters, bad_gradient, parameters, changed = struct.unpack_from("<4q", row.tobytes())
            present = int.from_bytes(row.tobytes()[32:], "little")
            unpacked.append(cls(hyperparameters, bad_gradient, parameters, changed, present))
        return unpacked


Judged = tuple[list[Tensor | None], int, Tensor | None]
"""As of :meth:`Agreement.own_gradients`."""


class LayoutChangedError(RuntimeError):
    """The parameters are laid out otherwise than the votes, alike on all ranks: lay out anew, and step again."""


class Agreement:
    """Finds out, on all ranks alike, whether the workers fit together, and whose votes count in a step.

    Args:
        on_bad_gradient: ``"abstain"`` or ``"raise"``, as of ``WorkersOptimizer``.
        check_replicas_steps: compares the parameters over the ranks every so many steps; 0: never.

    Attributes:
        handshake_done: whether the workers have found that they fit together; not so before the first step.
        bad_gradients: workers left out of a step for a bad gradient, over all steps.
        scaled: whether a gradient scaler calls, which handles overflows itself.
        known_finite: gradients of the next step that need no look.
        voting: the ranks whose votes count in this step.
        absent: indices of the parameters that no worker whose vote counts has a gradient for, in this step. They are
            left alone, as torch's optimizers do.
    """

    def __init__(self, on_bad_gradient: str, check_replicas_steps: int) -> None:
        self.on_bad_gradient = on_bad_gradient
        self.check_replicas_steps = check_replicas_steps
        self.handshake_done = False
        self.bad_gradients = 0
        self.scaled = False
        self.known_finite = KnownFinite()
        self.absent: frozenset[int] = frozenset()
        self._comparing_gradients = True
        self._overflows = 0
        self.voting: Sequence[int] = ()
        self._unheard = False

    def options(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {"on_bad_gradient": self.on_bad_gradient, "check_replicas_steps": self.check_replicas_steps}

    def own_gradients(
        self,
        gradients: list[Tensor | None],
        replica: Replica,
        rank: int,
        scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        *,
        defer: bool = False,
    ) -> Judged:
        """What this worker votes with: its gradients, or none where one is bad and it abstains.

        Args:
            gradients: by parameter.
            replica: this rank's.
            rank: this worker's number, for the log.
            scale: of a gradient scaler that has not been taken off the gradients; they are divided by it in place.
            found_inf: of a gradient scaler, whether it found an overflow; None without one.
            defer: do not wait for a GPU, if there is no gradient scaler.

        Returns:
            The gradients; the index of the first bad one, -1 if there is none; and the verdict of ``StepInputs``.
        """
        self.scaled = found_inf is not None
        if defer and not self.scaled and self.handshake_done and not self._comparing_gradients:
            device = replica.parameters[0].device
            return gradients, -1, verdict_on(gradients, device, self.known_finite.take_verdict(gradients))
        present = [gradient for gradient in gradients if gradient is not None]
        if scale is not None:
            self.known_finite.good = ()
            if present:
                torch._foreach_div_(present, scale.to(present[0].device))
        bad = first_bad_gradient(self.known_finite.take_doubtful(gradients))
        if bad < 0 and found_inf is not None and bool(found_inf):
            bad = 0  # something else, clipping by value say, has made finite what the scaler found to be infinite
        if replica.shards is not None:
            gradients, bad = _of_all_shards(replica, replica.shards, gradients, bad)
        if bad < 0:
            return gradients, bad, None
        self._warn(rank, replica, bad)
        return [None] * len(gradients), bad, None

    def settled(self, judged: Judged, replica: Replica, rank: int) -> Judged:
        """As :meth:`own_gradients` without ``defer``, of what it has returned with it."""
        return judged if judged[2] is None else self.own_gradients(judged[0], replica, rank)

    def shake_hands(
        self, channel: Channel, replica: Replica, gradients: Sequence[Tensor | None], compiled: bool
    ) -> bool:
        """Before the first step: whether all ranks have compiled. One round of 32 bytes a rank, if it is needed.

        Raises:
            RuntimeError: the ranks do not optimize the same parameters in the same way, or all have the same gradients.
        """
        if self.handshake_done and not self._comparing_gradients:
            return compiled
        own = Handshake(
            digest(replica.describe_layout()),
            int(compiled),
            checksum(replica.common),
            checksum([g for g in gradients if g is not None]),
        )
        if replica.shards is not None:
            values = [digest(replica.describe_method()), own.layout, own.parameters, own.gradients]
            device = replica.parameters[0].device
            method, layout, parameters, found = replica.shards.combine(values, device, alike=1)
            layout = digest((method, layout, replica.shards.rank, replica.shards.size))
            own = Handshake(layout, own.compiled, parameters, found)
        everyone = [
            Handshake(*row) for row in channel.gather_integers(list(astuple(own)), replica.parameters[0].device)
        ]
        if any(other.layout != own.layout for other in everyone):
            where = differing(channel, replica.describe_method(), replica.shards, alike=True)
            if where == _UNKNOWN:
                where = differing(channel, replica.describe_layout(), replica.shards)
            raise RuntimeError(
                f"the ranks do not optimize the same parameters in the same way: {where}. Build model and optimizer "
                "alike on every rank."
            )
        if any(other.parameters != own.parameters for other in everyone):
            where = differing(channel, replica.describe_parameters(), replica.shards)
            raise RuntimeError(
                "the parameters differ between the ranks before the first step, so the replicas would never be the "
                f"same: {where}. Wrap the model in DistributedDataParallel (accelerator.prepare does), which sends "
                "rank 0's parameters to all, or load the same weights on every rank."
            )
        self._compare_gradients([other.gradients for other in everyone])
        self.handshake_done = True
        return all(other.compiled for other in everyone)

    def header(self, inputs: StepInputs) -> Tensor:
        """The header of this rank, packed."""
        replica, every = inputs.replica, self.check_replicas_steps
        due = every and replica.step and replica.step % every == 0
        values = [
            digest(replica.describe_hyperparameters()),
            checksum(replica.common) if due else 0,
            digest(replica.describe_layout()) if inputs.changed else 0,
        ]
        bad = inputs.bad_gradient
        if replica.shards is not None:
            values.append(int(bad == CHANGED_GRADIENT))
            *values, sent_in_vain = replica.shards.combine(values, replica.parameters[0].device, alike=1)
            bad = CHANGED_GRADIENT if sent_in_vain else bad
        hyperparameters, compared, changed = values
        present = sum(1 << index for index, gradient in enumerate(inputs.gradients) if gradient is not None)
        own = Header(hyperparameters, bad, compared, changed, present)
        packed = own.pack(len(inputs.gradients), replica.parameters[0].device)
        self._unheard = inputs.verdict is not None
        if inputs.verdict is not None:
            packed.view(torch.int64)[1:2] = inputs.verdict  # in the place of `bad_gradient`
        return packed

    def voters(self, channel: Channel, replica: Replica, headers: Tensor) -> Sequence[int]:
        """The ranks that do not abstain, the same on all ranks; none, where a gradient scaler overflowed on all.

        Args:
            channel: the workers.
            replica: this rank's.
            headers: everyone's, with the first bucket of a step; ``[N, 0]`` with the others, where the same ranks vote.

        Raises:
            LayoutChangedError: the parameters of all ranks are laid out otherwise than the votes.
            RuntimeError: hyperparameters, parameters or their layout differ between the ranks.
            FloatingPointError: a bad gradient is to be raised, or all ranks have one and no gradient scaler.
        """
        if headers.shape[1]:
            self.voting = self._hear(channel, replica, Header.unpack(headers))
        return self.voting

    def stands(self, headers: Sequence[Header], parameters: int) -> bool:
        """Whether votes that were sent before the headers decide the step: all ranks vote, and nothing is amiss.

        Args:
            headers: everyone's.
            parameters: how many there are.
        """
        first = headers[0]
        alike = all((h.hyperparameters, h.parameters) == (first.hyperparameters, first.parameters) for h in headers)
        if not alike or any(header.changed or header.bad_gradient != -1 for header in headers):
            return False
        self._overflows = 0
        self.voting = range(len(headers))
        self._note_absent(headers, parameters)
        return True

    def check_alone(self, inputs: StepInputs, default_group: bool) -> None:
        """What is checked at a step of one worker alone.

        Args:
            inputs: of the step.
            default_group: whether the optimizer was given no process group.

        Raises:
            RuntimeError: other processes were launched with this one, or its shards differ in method or settings.
            FloatingPointError: its gradient is bad, without a gradient scaler or too often.
        """
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and default_group and not dist.is_initialized() and dist.is_torchelastic_launched():
            raise RuntimeError(
                f"this is one of {launched} processes that were launched together, without a process group: each "
                "would train for itself. First create an accelerate.Accelerator, or call "
                "torch.distributed.init_process_group."
            )
        if inputs.replica.shards is not None:
            _check_alike(inputs.replica, inputs.replica.shards)
        self._raise_for_bad(inputs.replica, {0: inputs.bad_gradient} if inputs.bad_gradient >= 0 else {}, 1)
        self.absent = frozenset(index for index, gradient in enumerate(inputs.gradients) if gradient is None)

    def _warn(self, rank: int, replica: Replica, bad: int) -> None:
        if not self.scaled and self.on_bad_gradient == "abstain":
            logger.warning("worker %d abstains from a step: %s", rank, replica.describe_bad_gradient(bad))

    def _compare_gradients(self, checksums: Sequence[int]) -> None:
        """At the first step at which not all are zero."""
        if not self._comparing_gradients or not any(checksums):
            return
        if len(set(checksums)) == 1:
            raise RuntimeError(
                f"all {len(checksums)} workers have exactly the same gradients, so their votes say nothing. Either "
                "the gradients were averaged before the step (DDP still all-reduces: call "
                "hf_dlion.keep_gradients_local before accelerator.prepare, or use DLionTrainer), or every worker "
                "was given the same data (shard the data loader: accelerator.prepare does, if its num_processes is "
                f"{len(checksums)}; on a machine without GPUs, that takes Accelerator(cpu=True) or --use_cpu)."
            )
        self._comparing_gradients = False

    def _hear(self, channel: Channel, replica: Replica, headers: Sequence[Header]) -> list[int]:
        if any(header.changed for header in headers):
            if all(header.changed == headers[0].changed for header in headers):
                raise LayoutChangedError
            where = differing(channel, replica.describe_layout(), replica.shards)
            raise RuntimeError(
                f"a parameter was changed on some ranks only: {where}. Resize, convert or move a model alike on every "
                "rank, between two steps."
            )
        if any(header.hyperparameters != headers[0].hyperparameters for header in headers):
            where = differing(channel, replica.describe_hyperparameters(), replica.shards, alike=True)
            raise RuntimeError(
                f"the ranks have different hyperparameters: {where}. Set them, and step the scheduler, alike on "
                "every rank."
            )
        if any(header.parameters != headers[0].parameters for header in headers):
            where = differing(channel, replica.describe_parameters(), replica.shards)
            raise RuntimeError(
                f"the parameters are no longer the same on all ranks at step {replica.step}: {where}. Something has "
                "changed them on some ranks only, or their hardware rounds differently. Resume from a checkpoint of "
                "before, on hardware of one kind."
            )
        bad = {rank: header.bad_gradient for rank, header in enumerate(headers) if header.bad_gradient >= 0}
        if self._unheard and channel.rank in bad:
            self._warn(channel.rank, replica, bad[channel.rank])
        self._raise_for_bad(replica, bad, len(headers))
        self.bad_gradients += len(bad)
        voters = [rank for rank in range(len(headers)) if rank not in bad]
        self._note_absent([headers[rank] for rank in voters], len(replica.parameters))
        return voters

    def _note_absent(self, headers: Sequence[Header], parameters: int) -> None:
        """Of so many parameters, by the headers of those whose votes count."""
        present = functools.reduce(operator.or_, (header.present for header in headers), 0)
        indices = range(0 if present == (1 << parameters) - 1 else parameters)
        self.absent = frozenset(index for index in indices if not present >> index & 1)

    def _raise_for_bad(self, replica: Replica, bad: dict[int, int], workers: int) -> None:
        """Raise FloatingPointError where these bad gradients, by rank, do not only lead to abstentions."""
        everywhere = len(bad) == workers
        self._overflows = self._overflows + 1 if everywhere and self.scaled else 0
        if self.scaled:
            fatal = self._overflows == _MOST_OVERFLOWS
        else:
            fatal = everywhere or (bool(bad) and self.on_bad_gradient == "raise")
        if fatal:
            rank, index = next(iter(bad.items()))
            so_often = f"all workers overflowed in {_MOST_OVERFLOWS} steps in a row; " if self.scaled else ""
            raise FloatingPointError(f"{so_often}rank {rank}: {replica.describe_bad_gradient(index)}")


def _check_alike(replica: Replica, shards: Shards) -> None:
    """Raise RuntimeError, on all ranks of a replica, unless all of its shards would be stepped in the same way."""
    description = replica.describe_method() | replica.describe_hyperparameters()
    rows = shards.channel.gather_integers([digest(description)], replica.parameters[0].device)
    if len({row[0] for row in rows}) > 1:
        raise RuntimeError(
            "the ranks of one replica do not optimize their shards in the same way: "
            f"{differing(shards.channel, description)}. Build the optimizer, set its hyperparameters, and step the "
            "scheduler, alike on every rank."
        )


def _of_all_shards(
    replica: Replica, shards: Shards, gradients: list[Tensor | None], bad: int
) -> tuple[list[Tensor | None], int]:
    """The gradients of a rank and the verdict on them, as its replica has them: zeros where only others have one."""
    held = replica.parameters
    bad, present = shards.verdict(bad, [gradient is not None for gradient in gradients], held[0].device)
    of_replica = [
        torch.zeros_like(parameter) if anywhere and gradient is None else gradient
        for parameter, gradient, anywhere in zip(held, gradients, present, strict=True)
    ]
    return of_replica, bad


def differing(
    channel: Channel, description: dict[str, Any], shards: Shards | None = None, *, alike: bool = False
) -> str:
    """Where the ranks' descriptions differ, in words. A collective, for error messages.

    Args:
        channel: the workers.
        description: what is compared: a name for each value, in the order in which to look.
        shards: those of the replica, whose descriptions belong together.
        alike: whether the shards' should be the same.
    """
    if shards is not None:
        description = shards.describe(description, alike)
    everyone = channel.gather_objects(description)
    for name in dict.fromkeys(key for one in everyone for key in one):
        ranks: dict[str, list[int]] = {}
        for rank, one in enumerate(everyone):
            ranks.setdefault(str(one.get(name, "absent")), []).append(rank)
        if len(ranks) > 1:
            where = [f"{value} on rank{'s' * (len(of) > 1)} {', '.join(map(str, of))}" for value, of in ranks.items()]
            return f"{name} is {' and '.join(where[:_SHOWN])}{', and so on' * (len(where) > _SHOWN)}"
    return _UNKNOWN
