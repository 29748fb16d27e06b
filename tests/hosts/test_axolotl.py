"""The plugin under Axolotl itself, over two processes, and without it."""

from __future__ import annotations

import importlib
import json
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from hf_dlion import DLionArgumentsMixin, DLionTrainerMixin
from tests.hosts.launching import LAUNCH, ROOT, check_that_two_voted, run
from tests.trainer import tiny_llama

NAME = "hf_dlion.integrations.axolotl"


class Config(dict):  # type: ignore[type-arg]
    """As Axolotl's: what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plugin on a stand-in for Axolotl, of which it needs a base class and a Trainer."""
    pytest.importorskip("pydantic", reason="pydantic, which Axolotl has, is not installed")
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base", "axolotl.core"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    trainers = types.ModuleType("axolotl.core.trainers")
    trainers.AxolotlTrainer = type("AxolotlTrainer", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "axolotl.core.trainers", trainers)
    sys.modules["axolotl.integrations.base"].BasePlugin = object  # type: ignore[attr-defined]
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    module = importlib.import_module(NAME)
    yield module.DLionPlugin()
    del sys.modules[NAME]


def test_what_the_plugin_names_is_there(plugin: Any) -> None:
    for name in (plugin.get_input_args(), plugin.get_training_args_mixin()):
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)
    schema = sys.modules[NAME].DLionInput.model_fields
    assert set(schema) == {field.name for field in fields(DLionArgumentsMixin)} - {"optim"}
    given = plugin.get_training_args(Config(vote_tie="alternate", adversaries=0, optimizer="dlion_mavo"))
    assert given == {"vote_tie": "alternate", "adversaries": 0}


def test_the_trainer_is_mixed_for_our_names_only(plugin: Any) -> None:
    assert plugin.get_trainer_cls(Config(optimizer="adamw_torch", rl="dpo")) is None
    for option in ({"local_steps": 4}, {"gradient_votes": "avg"}):
        assert plugin.get_trainer_cls(Config(optimizer="adamw_torch", **option)) is not None
    for option in ({"kd_trainer": True}, {"embedding_lr": 1e-5}):
        with pytest.raises(ValueError, match=f"optimizer: dmuon_mavo with {next(iter(option))}"):
            plugin.get_trainer_cls(Config(optimizer="dmuon_mavo", **option))
    assert plugin.get_trainer_cls(Config(optimizer="dlion_mavo", embedding_lr=1e-5)) is not None
    mixed = plugin.get_trainer_cls(Config(optimizer="dlion_mavo"))
    assert mixed.__mro__[1] is DLionTrainerMixin
    with pytest.raises(ValueError, match="optimizer: dlion_mavo with rl: dpo.*mix DLionTrainerMixin into TRL's"):
        plugin.get_trainer_cls(Config(optimizer="dlion_mavo", rl="dpo"))


def test_two_processes_train_by_name(tmp_path: Path) -> None:
    pytest.importorskip("axolotl.cli.train", reason="Axolotl is not installed")
    yaml = importlib.import_module("yaml")
    rows = [{"instruction": tiny_llama.counting(i), "input": "", "output": tiny_llama.counting(i)} for i in range(64)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = yaml.safe_load((ROOT / "examples/hosts/axolotl_sft.yaml").read_text())
    config |= {"base_model": tiny_llama.save(tmp_path / "model"), "dataset_prepared_path": str(tmp_path / "prepared")}
    config |= {"datasets": [{"path": str(tmp_path / "rows.jsonl"), "ds_type": "json", "type": "alpaca"}]}
    config |= {"sequence_len": 128, "max_steps": 3, "logging_steps": 1, "save_steps": 3, "bf16": False}
    config |= {"vote_tie": "alternate", "output_dir": str(tmp_path / "out")}
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config))
    variables = {"ACCELERATE_USE_CPU": "true", "AXOLOTL_DO_NOT_TRACK": "1"}
    run(*LAUNCH, "tests/hosts/axolotl_on_a_cpu.py", tmp_path / "sft.yaml", **variables)
    check_that_two_voted(tmp_path / "out", 3)
