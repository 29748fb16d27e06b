"""The scripts of `examples/hosts/` over two processes, with the programs that they are for, if these are installed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from tests.hosts.launching import LAUNCH, check_that_two_voted, run
from tests.trainer import tiny_llama

STEPS = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


def test_llamafactory(tmp_path: Path) -> None:
    pytest.importorskip("llamafactory", reason="LLaMA-Factory is not installed")
    rows = [{"instruction": tiny_llama.counting(i), "input": "", "output": tiny_llama.counting(i)} for i in range(64)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    config = {"model_name_or_path": tiny_llama.save(tmp_path / "model"), "dataset_dir": str(tmp_path)}
    config |= {"stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4, "dataset": "rows"}
    config |= {"template": "alpaca", "cutoff_len": 64, "use_cpu": True, "report_to": "none", "optim": "dlion_mavo"}
    config |= {"output_dir": str(tmp_path / "out"), **STEPS}
    (tmp_path / "sft.yaml").write_text(json.dumps(config))  # which is YAML as well
    run(*LAUNCH, "examples/hosts/llamafactory_train.py", tmp_path / "sft.yaml")
    check_that_two_voted(tmp_path / "out", 3)


def test_sentence_transformers(tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
    words = ["<pad>", "<unk>", *["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]]
    words += [f"{i}{j}" for i in range(10) for j in range(10)]
    known = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    known.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "model_max_length": 8}
    PreTrainedTokenizerFast(tokenizer_object=known, **special).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(tmp_path / "model")
    script = "examples/hosts/sentence_transformers_train.py"
    options = [text for name, value in STEPS.items() for text in (f"--{name}", str(value))]
    paths = ["--model", tmp_path / "model", "--output_dir", tmp_path / "out"]
    run(
        *LAUNCH,
        script,
        "--use_cpu",
        "--optim",
        "dlion_mavo",
        "--report_to",
        "none",
        "--save_steps",
        "3",
        *options,
        *paths,
    )
    check_that_two_voted(tmp_path / "out", 3)


def test_lightning() -> None:
    pytest.importorskip("lightning", reason="Lightning is not installed")
    said = run(LAUNCH[0], "examples/hosts/lightning_fit.py")
    found = re.search(r"^(\d+)% of the rows right; (\d+) bytes sent in 160 steps$", said, re.MULTILINE)
    assert found is not None, said
    assert int(found[1]) > 95
    assert 0 < int(found[2]) < 160 * 4 * 450 / 8  # of 450 parameters, a few bits each with the headers
