"""Axolotl: ``plugins: [hf_dlion.integrations.axolotl.DLionPlugin]`` and ``optimizer: dlion_mavo`` in its YAML.

Axolotl puts the class that ``get_training_args_mixin`` names among the bases of its training arguments, that of
``get_input_args`` among those of its YAML's schema, and takes its Trainer from the first plugin that has one.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from axolotl.integrations.base import BasePlugin
from pydantic import create_model

from ..trainer.arguments import DLionArgumentsMixin
from ..trainer.methods import METHODS
from ..trainer.trainer import DLionTrainerMixin

_TYPES = get_type_hints(DLionArgumentsMixin)
OPTIONS = [field.name for field in fields(DLionArgumentsMixin) if field.name != "optim"]

_TRAINERS = ("rl", "reward_model", "process_reward_model", "kd_trainer", "trainer_cls")
_GROUPS = ("embedding_lr", "embedding_lr_scale", "lr_groups", "loraplus_lr_ratio")

DLionInput = create_model("DLionInput", **{name: (_TYPES[name] | None, None) for name in OPTIONS})


class DLionPlugin(BasePlugin):
    """Makes ``optimizer: dlion_mavo`` and the other names of this package work; the YAML takes their options too."""

    def get_input_args(self) -> str:
        """Where the keys are that the YAML may have."""
        return f"{__name__}.DLionInput"

    def get_training_args_mixin(self) -> str:
        """Where the fields are that the training arguments get."""
        return "hf_dlion.DLionArgumentsMixin"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """The options that the YAML has."""
        return {name: cfg[name] for name in OPTIONS if cfg.get(name) is not None}

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Axolotl's Trainer with our mixin; None, which leaves the choice to Axolotl, with an optimizer of its own.

        Raises:
            ValueError: the YAML asks for another Trainer than that of supervised finetuning or pretraining, or for
                param groups beside those of a method.
        """
        if cfg.optimizer not in METHODS and not cfg.get("local_steps") and not cfg.get("gradient_votes"):
            return None
        others = [name for name in _TRAINERS if cfg.get(name)]
        if others:
            raise ValueError(
                f"optimizer: {cfg.optimizer} with {others[0]}: {cfg[others[0]]}. The plugin has the Trainer of "
                "pretraining and supervised finetuning only. For preferences and rewards, mix DLionTrainerMixin into "
                "TRL's Trainer, or take an optimizer of transformers."
            )
        of_groups = [name for name in _GROUPS if cfg.get(name)]
        if of_groups and cfg.optimizer in METHODS and METHODS[cfg.optimizer].takes_hidden_matrices:
            raise ValueError(
                f"optimizer: {cfg.optimizer} with {of_groups[0]}: {cfg[of_groups[0]]}. That method has param groups of "
                "its own, for hidden matrices, and these would have no effect. Leave it out, or take dlion."
            )
        from axolotl.core.trainers import AxolotlTrainer  # once all plugins are registered: it merges their arguments

        class DLionAxolotlTrainer(DLionTrainerMixin, AxolotlTrainer):
            pass

        return DLionAxolotlTrainer
