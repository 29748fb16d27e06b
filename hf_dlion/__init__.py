"""Distributed Lion for Hugging Face: train transformers over ordinary networks, one bit per parameter."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .optim.dlion import DistributedLion

if TYPE_CHECKING:
    from .trainer.arguments import DLionArgumentsMixin, DLionTrainingArguments
    from .trainer.checkpoints import last_complete_checkpoint, load_workers, save_workers
    from .trainer.local_gradients import keep_gradients_local
    from .trainer.theory import LionTheoryCallback
    from .trainer.trainer import DLionTrainer, DLionTrainerMixin

__version__ = "0.1.0"

# transformers takes seconds to import: only when one of these names is asked for.
_LAZY = {
    "DLionArgumentsMixin": "arguments",
    "DLionTrainingArguments": "arguments",
    "keep_gradients_local": "local_gradients",
    "last_complete_checkpoint": "checkpoints",
    "load_workers": "checkpoints",
    "save_workers": "checkpoints",
    "LionTheoryCallback": "theory",
    "DLionTrainer": "trainer",
    "DLionTrainerMixin": "trainer",
}

__all__ = [
    "DLionArgumentsMixin",
    "DLionTrainer",
    "DLionTrainerMixin",
    "DLionTrainingArguments",
    "DistributedLion",
    "LionTheoryCallback",
    "keep_gradients_local",
    "last_complete_checkpoint",
    "load_workers",
    "save_workers",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".trainer.{_LAZY[name]}", __name__), name)
