"""Text that is read while training: without end, the same again, and without rows that have none."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from common.errors import DataError
from common.text_data import TextOptions
from common.text_stream import stream_text_data

ROWS = 40


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    numbers = {str(number): number for number in range(10)}
    made = Tokenizer(models.WordLevel(numbers | {"?": 10, "<eos>": 11}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", eos_token="<eos>").save_pretrained(folder)
    return str(folder)


def streamed(tmp_path: Path, tokenizer: str, *rows: Any, fraction: float = 0.3) -> Any:
    texts = [{"text": " ".join(f"{(7 * row + i) % 10}" for i in range(9))} for row in range(ROWS)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*texts, *rows]))
    options = TextOptions(
        dataset=str(path),
        dataset_config=None,
        text_column="text",
        tokenizer=tokenizer,
        vocab_size=300,
        block_size=10,
        validation_fraction=fraction,
        max_eval_blocks=4,
        cache_dir=None,
    )
    return stream_text_data(options, seed=1)


def blocks(data: Any, count: int) -> list[list[int]]:
    return [row["input_ids"] for row in islice(iter(data.train), count)]


def test_a_stream_goes_on_after_a_pass_and_begins_alike(tmp_path: Path, tokenizer: str) -> None:
    data = streamed(tmp_path, tokenizer)
    first = blocks(data, 3 * ROWS)
    assert len(first) == 3 * ROWS
    assert blocks(data, 3 * ROWS) == first
    held_out = [row["input_ids"] for row in data.validation]
    assert not [block for block in first if block in held_out]


def test_rows_without_text_are_left_out(tmp_path: Path, tokenizer: str) -> None:
    plain = blocks(streamed(tmp_path, tokenizer), ROWS)
    assert blocks(streamed(tmp_path, tokenizer, {"text": None}, {"text": " \n"}), ROWS) == plain


def test_what_cannot_be_streamed_is_said(tmp_path: Path, tokenizer: str) -> None:
    with pytest.raises(DataError, match="all documents with text are kept for validation"):
        streamed(tmp_path, tokenizer, fraction=0.9999)
