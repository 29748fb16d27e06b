"""Distributed Lion for Hugging Face: train transformers over ordinary networks, one bit per parameter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .optim.dlion import DistributedLion
from .optim.hidden import hidden_matrices
from .optim.local_steps import LocalSteps
from .optim.muon import DistributedMuon

if TYPE_CHECKING:
    from .checkpoint.complete import last_complete_checkpoint
    from .checkpoint.workers import load_workers, save_workers
    from .gradient_votes import vote_gradients
    from .local_gradients import keep_gradients_local
    from .trainer.arguments import DLionArgumentsMixin, DLionTrainingArguments
    from .trainer.theory import LionTheoryCallback
    from .trainer.trainer import DLionTrainer, DLionTrainerMixin

__version__ = "0.1.0"

# transformers takes seconds to import, accelerate one: only when one of these names is asked for.
_LAZY = {
    "DLionArgumentsMixin": "trainer.arguments",
    "DLionTrainer": "trainer.trainer",
    "DLionTrainerMixin": "trainer.trainer",
    "DLionTrainingArguments": "trainer.arguments",
    "LionTheoryCallback": "trainer.theory",
    "keep_gradients_local": "local_gradients",
    "last_complete_checkpoint": "checkpoint.complete",
    "load_workers": "checkpoint.workers",
    "save_workers": "checkpoint.workers",
    "vote_gradients": "gradient_votes",
}

__all__ = [
    "DLionArgumentsMixin",
    "DLionTrainer",
    "DLionTrainerMixin",
    "DLionTrainingArguments",
    "DistributedLion",
    "DistributedMuon",
    "LionTheoryCallback",
    "LocalSteps",
    "hidden_matrices",
    "keep_gradients_local",
    "last_complete_checkpoint",
    "load_workers",
    "save_workers",
    "vote_gradients",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
