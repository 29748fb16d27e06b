"""What a Trainer does with ``gradient_votes``: DDP or FSDP2 get hooks, and one process lets its workers take turns."""

from __future__ import annotations

from typing import Any

from accelerate.utils import compare_versions
from torch import nn

from ..gradient_votes import VotedGradients, vote_gradients
from ..local_gradients import LocalGradients, keep_gradients_local, voting_group
from ..optim.signed_gradients import SignedGradients, VirtualGradients
from ..optim.workers import members_of
from .workers import WorkersMixin


class GradientVotesMixin(WorkersMixin):
    """Gives any Trainer votes on gradients; without ``args.gradient_votes``, nothing changes."""

    _in_turns: VirtualGradients | None = None
    """The workers of this process, where it is alone."""
    _on_shards: SignedGradients | None = None
    """This replica's part, where replicas are sharded."""
    _hooked_in: nn.Module | None = None

    @property
    def voting(self) -> SignedGradients | VirtualGradients | None:
        """What this process has in the votes on gradients; None where there are none, or before training."""
        if self._in_turns is not None or self._on_shards is not None:
            return self._in_turns or self._on_shards
        handler = self.accelerator.ddp_handler
        return handler.votes[-1] if isinstance(handler, VotedGradients) and handler.votes else None

    def _hook_in(self) -> None:
        """Before the model is wrapped: its gradients are to be voted on."""
        if self.args.world_size == 1 or isinstance(self.accelerator.ddp_handler, VotedGradients | LocalGradients):
            return
        if voting_group(self.accelerator) is not None:
            keep_gradients_local(self.accelerator)
            return
        options = self._vote_options()
        vote_gradients(self.accelerator, options.pop("aggregation"), **options)

    def _vote_on_shards(self, model: nn.Module) -> None:
        """Before a step: a model that has been sharded since the last one gets its hooks."""
        if self._hooked_in is model or not self._gradient_votes or self.args.world_size == 1:
            return
        group = voting_group(self.accelerator)
        if group is None:
            return
        if self.args.gradient_accumulation_steps > 1 and compare_versions("accelerate", "<", "1.11"):
            raise ValueError(
                "gradient_votes with sharded replicas and gradient_accumulation_steps: accelerate before 1.11 would "
                "have each micro-batch voted on. Update accelerate, or set gradient_accumulation_steps to 1."
            )
        options = self._vote_options() | {"process_group": group}
        self._hooked_in, self._on_shards = model, vote_gradients(model, options.pop("aggregation"), **options)

    def _begin_turns(self) -> None:
        """As a training begins in one process."""
        options = self._vote_options() | {"scaler": self.accelerator.scaler}
        self._in_turns = VirtualGradients(self.model.named_parameters(), self.args.virtual_workers, **options)

    def _vote_options(self) -> dict[str, Any]:
        args = self.args
        return {
            "aggregation": args.gradient_votes,
            "exchange": args.vote_exchange,
            "on_bad_gradient": args.on_bad_gradient,
        }

    def _refuse_own_optimizer(self) -> None:
        if self._gradient_votes and members_of(self.optimizer):
            name = type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__
            raise ValueError(
                f"gradient_votes={self._gradient_votes!r}, and an optimizer of class {name} was given, which exchanges "
                "votes or codes itself. Leave gradient_votes out, or take an optimizer that steps alone."
            )
