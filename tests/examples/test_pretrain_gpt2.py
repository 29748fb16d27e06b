"""The pretraining example: its data, its errors, and a run of two processes under accelerate launch."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from common.errors import DataError
from common.text_corpora import standard_library
from common.text_data import TextOptions, load_text_data

ROOT = Path(__file__).parents[2]

LAUNCH = ["accelerate.commands.launch", "--config_file", "examples/launch/cpu_2.yaml", "examples/pretrain_gpt2.py"]
TINY = ["--vocab_size", "300", "--block_size", "32", "--per_device_train_batch_size", "2", "--max_eval_blocks", "8"]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two hundred short documents, in JSON lines."""
    path = tmp_path / "corpus.jsonl"
    rows = [{"text": f"Document {i} says that {i} times two is {2 * i}. " * 3} for i in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(corpus: Path | str, cache: Path, **changes: Any) -> TextOptions:
    settings: dict[str, Any] = {
        "dataset": str(corpus),
        "dataset_config": None,
        "text_column": "text",
        "tokenizer": None,
        "vocab_size": 300,
        "block_size": 32,
        "validation_fraction": 0.2,
        "max_eval_blocks": 0,
        "cache_dir": str(cache),
    }
    return TextOptions(**(settings | changes))


def load(chosen: TextOptions) -> Any:
    return load_text_data(chosen, contextlib.nullcontext, show_progress=False)


def test_blocks_hold_every_document_of_their_split_once(corpus: Path, tmp_path: Path) -> None:
    data = load(options(corpus, tmp_path / "cache"))
    texts = []
    for split in (data.train, data.validation):
        tokens = torch.cat([block["input_ids"] for block in split])
        assert all(len(block["input_ids"]) == 32 for block in split)
        texts.append(data.tokenizer.decode(tokens))
    found = [{piece.split(" says")[0] for piece in text.split("<|endoftext|>")[:-1]} for text in texts]
    assert found[0].isdisjoint(found[1])
    assert len(found[0] | found[1]) > 195  # the rest of a split that fills no block is left out
    assert 20 < len(found[1]) < 60


def test_files_of_one_line_are_cut_within_it(tmp_path: Path) -> None:
    (tmp_path / "article.txt").write_text("a line " * 1000 + "\n")
    data = load(options(tmp_path, tmp_path / "cache"))
    train, validation = (32 * len(split) for split in (data.train, data.validation))
    assert validation / (train + validation) == pytest.approx(0.2, abs=0.05)


def test_the_cache_is_used_and_depends_on_the_content(corpus: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load(options(corpus, cache))
    written = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    assert load(options(corpus, cache)).key == first.key
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == written
    with corpus.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert load(options(corpus, cache)).key != first.key


def test_the_standard_library_is_split_by_file() -> None:
    documents = list(standard_library(0.05).documents())
    held_out = sum(document.held_out for document in documents)
    assert len(documents) > 100
    assert 0.01 < held_out / len(documents) < 0.1
    assert standard_library(0.05).key == standard_library(0.05).key != standard_library(0.1).key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "nowhere.txt"}, "no such file or folder"),
        ({"text_column": "body"}, "body.*text"),
        ({"tokenizer": "/nowhere/tokenizer"}, "tokenizer"),
        ({"block_size": 100_000}, "block"),
    ],
)
def test_wrong_data_is_an_error_before_training(
    changes: dict[str, Any], message: str, corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        load(options(changes.pop("dataset", corpus), tmp_path / "cache", **changes))


def test_two_processes_train_and_resume(corpus: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}

    def launch(*more: str) -> dict[str, Any]:
        run = [sys.executable, "-m", *LAUNCH, "--use_cpu", "--dataset", str(corpus), *TINY, "--optim", "dlion_avg"]
        run += ["--cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out"), *more]
        done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr
        assert "bytes of an fp32 all-reduce" in done.stdout
        results: dict[str, Any] = json.loads((tmp_path / "out" / "results.json").read_text())
        return results

    first = launch("--max_steps", "4", "--save_steps", "2")
    assert (first["workers"], first["method"], first["steps"]) == (2, "dlion_avg", 4)
    assert first["validation_loss_last"] < first["validation_loss_first"]
    assert 30 < first["fp32_allreduce_over_sent"] <= 32
    again = launch("--max_steps", "6", "--resume_from_checkpoint", "auto")
    assert (again["steps"], again["bytes_counted_steps"]) == (6, 2)
