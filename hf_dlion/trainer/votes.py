"""What a Trainer does with ``gradient_votes``: DDP gets a hook, and one process lets its workers take turns."""

from __future__ import annotations

from typing import Any

from ..gradient_votes import VotedGradients, vote_gradients
from ..optim.signed_gradients import SignedGradients, VirtualGradients
from ..optim.workers import members_of
from .workers import WorkersMixin


class GradientVotesMixin(WorkersMixin):
    """Gives any Trainer votes on gradients; without ``args.gradient_votes``, nothing changes."""

    _in_turns: VirtualGradients | None = None
    """The workers of this process, where it is alone."""

    @property
    def voting(self) -> SignedGradients | VirtualGradients | None:
        """What this process has in the votes on gradients; None where there are none, or before training."""
        if self._in_turns is not None:
            return self._in_turns
        handler = self.accelerator.ddp_handler
        return handler.votes[-1] if isinstance(handler, VotedGradients) and handler.votes else None

    def _hook_in(self) -> None:
        """Before the model is wrapped: DDP's gradients are to be voted on."""
        if self.args.world_size > 1 and not isinstance(self.accelerator.ddp_handler, VotedGradients):
            options = self._vote_options()
            vote_gradients(self.accelerator, options.pop("aggregation"), **options)

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
