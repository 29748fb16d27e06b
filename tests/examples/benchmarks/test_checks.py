"""What parts of a step take of it: the models are those of the pretraining example, and it is measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from benchmarks import shares
from common import gpt2_models

from ..command import run_module


@pytest.mark.parametrize("name", shares.SIZES)
def test_models_are_those_of_pretrain_gpt2(name: str) -> None:
    words = {str(number): number for number in range(shares.VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")))
    theirs = gpt2_models.build_model(name, tokenizer, 32)
    ours = shares.build_model(name, 32)
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run_module("examples.benchmarks.gpu", "--output", str(tmp_path))
    assert done.returncode == 2
    assert "there is no GPU" in done.stderr


@pytest.mark.parametrize("name", ["checks", "orthogonal"])
def test_the_share_is_measured(name: str, tmp_path: Path) -> None:
    few = ["--models", "gpt2-tiny", "--rows", "1", "--length", "16", "--steps", "4", "--output", str(tmp_path)]
    done = run_module(f"examples.benchmarks.{name}", *few)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads((tmp_path / "results.json").read_text())["models"]
    assert 0 < found["share_median"] < 1
    assert {len(seconds) for seconds in found["processor_seconds"].values()} == {4}
