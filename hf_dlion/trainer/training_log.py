"""What the log of a training gets from the workers: the traffic, the votes, the norm of their gradients."""

from __future__ import annotations

from typing import Any

import torch

from ..optim.states import all_parameters
from ..optim.tensors import local
from ..wire.ledger import Ledger, fp32_all_reduce_bytes
from .theory import LionTheoryCallback
from .votes import GradientVotesMixin


class TrainingLogMixin(GradientVotesMixin):
    """Adds to the log what :class:`hf_dlion.DLionTrainerMixin` says of it."""

    callback_handler: Any
    control: Any

    _observed: dict[str, float] | None = None
    """What the next log of training gets."""

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        # The parent gathers the loss of all ranks here, so they come together; to log() one may come alone.
        if (
            self._exchanges and self.control.should_log and self.state.global_step > self._globalstep_last_logged  # type: ignore[attr-defined]
        ):
            self._observed = self._observations(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)  # type: ignore[misc]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the parent, with the traffic and the votes in the logs of training.

        May be called on one rank. The log of training that is due then still comes, on all ranks.
        """
        others = self._observed is None
        if self._observed is not None and "loss" in logs and "learning_rate" in logs:
            logs, self._observed = {**logs, **self._observed}, None
        due = self.control.should_log
        super().log(logs, start_time)  # type: ignore[misc]
        if others and self._exchanges:
            self.control.should_log = due  # the parent takes any log for it, and the other ranks would wait

    def _count_from_here(self) -> None:
        """What was sent, and which gradients were bad, in an earlier training is not for the log of this one."""
        source = self._counted = self._source()
        self._at_start = Ledger() if source is None else source.ledger.copy()
        self._logged, self._logged_bad_gradients = self._at_start.copy(), getattr(source, "bad_gradients", 0)
        if source is not None:
            source.vote_shares()

    def _source(self) -> Any:
        """What counts bytes, votes and bad gradients; None, where DDP is yet to be given its hook."""
        return self.voting if self._gradient_votes else self._own_optimizer()

    def _observations(self, grad_norm: Any) -> dict[str, float]:
        """A collective over the workers."""
        source = self._source()
        if source is not self._counted:  # DDP has its hook since then
            self._counted, self._at_start, self._logged, self._logged_bad_gradients = source, Ledger(), Ledger(), 0
        found = self._traffic(source.ledger, source.workers)
        found["bad_gradients"] = source.bad_gradients - self._logged_bad_gradients
        self._logged_bad_gradients = source.bad_gradients
        shares = source.vote_shares()
        if shares is not None:
            found |= {"vote_ties": shares.ties, "vote_unanimous": shares.unanimous}
        if grad_norm is not None and self._gradients_stay_local:
            norm = torch.as_tensor(grad_norm, device=self.accelerator.device)
            found["grad_norm"] = self.accelerator.reduce(norm, reduction="mean").item()
        found = {name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, LionTheoryCallback):
                found |= callback.observations()
        return found

    def _traffic(self, total: Ledger, workers: int) -> dict[str, float]:
        trained = all_parameters(self._own_optimizer())
        new = total.since(self._logged)
        self._logged = total.copy()
        found: dict[str, float] = {"bytes_sent_total": total.since(self._at_start).sent_bytes}
        if new.steps:
            parameters = sum(parameter.numel() for parameter in trained)
            found["bits_sent_per_param"] = 8 * new.sent_bytes / (parameters * new.steps)
            found["bits_received_per_param"] = 8 * new.received_bytes / (parameters * new.steps)
            if workers > 1:
                held = sum(local(parameter).numel() for parameter in trained)
                found["fp32_allreduce_ratio"] = new.sent_bytes / (fp32_all_reduce_bytes(held, workers) * new.steps)
        return found
