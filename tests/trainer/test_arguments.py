from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from transformers import HfArgumentParser, TrainingArguments
from transformers.training_args import OptimizerNames

from hf_dlion import DLionArgumentsMixin, DLionTrainingArguments
from hf_dlion.trainer.methods import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_our_names_from_python_and_from_the_command_line(name: str, tmp_path: Path) -> None:
    options = ["--output_dir", str(tmp_path), "--optim", name, "--vote_tie", "alternate", "--use_cpu"]
    [parsed] = HfArgumentParser(DLionTrainingArguments).parse_args_into_dataclasses(options)
    given = DLionTrainingArguments(output_dir=str(tmp_path), optim=name, vote_tie="alternate", use_cpu=True)
    for arguments in (parsed, given, dataclasses.replace(given)):
        assert arguments.optim == name
        assert arguments.votes
        assert not arguments.average_tokens_across_devices
        assert json.loads(arguments.to_json_string())["optim"] == name
        assert arguments.to_dict()["vote_tie"] == "alternate"


def test_names_of_transformers_mean_what_they_meant(tmp_path: Path) -> None:
    for name in ("adamw_torch", "adafactor", OptimizerNames.ADAGRAD):
        arguments = DLionTrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True)
        assert arguments.optim == TrainingArguments(output_dir=str(tmp_path), optim=name, use_cpu=True).optim
        assert not arguments.votes
        assert arguments.average_tokens_across_devices
    default = DLionTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert default.optim == TrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim


def test_an_unknown_name_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is not known. Did you mean 'dlion_mavo'\?.*dlion_avg.*adamw_torch"):
        DLionTrainingArguments(output_dir=str(tmp_path), optim="dlion_mvo")
    with pytest.raises(ValueError, match=r"Did you mean 'dmuon_mavo'\?"):  # gmuon is nearer by its letters
        DLionTrainingArguments(output_dir=str(tmp_path), optim="dmuon")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vote_tie": "coin"}, "vote_tie='coin'.*'auto', 'zero', 'alternate'"),
        ({"vote_exchange": "ring"}, "vote_exchange='ring'.*'auto', 'gather', 'sharded', 'hierarchical'"),
        ({"fp16": True, "virtual_workers": 2}, "fp16 with virtual_workers=2.*bf16=True"),
        ({"on_bad_gradient": "ignore"}, "on_bad_gradient='ignore'.*'abstain', 'raise'"),
        ({"fsdp": True}, "with fsdp on CPUs: accelerate shards on GPUs only"),
    ],
)
def test_wrong_options(options: dict[str, object], message: str, tmp_path: Path) -> None:
    # transformers 4.57 turns FSDP on in the environment.
    with mock.patch.dict(os.environ), pytest.raises(ValueError, match=message):
        DLionTrainingArguments(output_dir=str(tmp_path), optim="dlion_avg", use_cpu=True, **options)


def test_the_mixin_serves_other_arguments(tmp_path: Path) -> None:
    @dataclasses.dataclass
    class Other(TrainingArguments):
        flavour: str = "plain"

    @dataclasses.dataclass
    class DLionOther(DLionArgumentsMixin, Other):
        pass

    arguments = DLionOther(output_dir=str(tmp_path), optim="dlion_avg", flavour="sweet", use_cpu=True)
    assert (arguments.optim, arguments.flavour, arguments.lion_beta2) == ("dlion_avg", "sweet", 0.99)


def test_help_names_the_methods() -> None:
    try:
        HfArgumentParser(TrainingArguments).format_help()
    except TypeError as error:  # a bare % in transformers 5.2
        pytest.skip(f"the help of this transformers fails by itself: {error}")
    text = HfArgumentParser(DLionTrainingArguments).format_help()
    assert all(
        name in text for name in [*METHODS, "--lion_beta1", "--vote_exchange {auto,gather,sharded,hierarchical}"]
    )


def test_importing_the_package_imports_no_transformers() -> None:
    code = "import sys, hf_dlion; hf_dlion.DistributedLion; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_another_major_version_is_refused() -> None:
    code = "import transformers; transformers.__version__ = '6.0.0'; import importlib.metadata as m; "
    code += "real = m.version; m.version = lambda name: '6.0.0' if name == 'transformers' else real(name); "
    code += "from hf_dlion import DLionTrainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "transformers>=4.57,<6 is required" in done.stderr


def test_a_name_that_is_not_there() -> None:
    import hf_dlion

    with pytest.raises(AttributeError, match="no attribute 'Lion'"):
        hf_dlion.Lion  # noqa: B018
