"""From rows of instruction, input and output to token ids of which only the response is learned.

The prompt and the response are tokenised apart, so that no token spans their border, and a model that is asked later
sees exactly the prompt's ids that it was trained with. A row is

    prompt (with BOS where the tokenizer adds one) | response | end token

and its labels are the response and the end token; everything else is -100. In a response, text that looks like a
special token is text.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .errors import DataError
from .instruction_prompts import PromptFormat, prompt_format
from .instruction_rows import Row, read_rows
from .text_corpora import share

IGNORED = -100  # label of what is not learned


_ENCODE_BATCH = 1000  # rows


class Example(NamedTuple):
    ids: np.ndarray
    prompt_length: int


@dataclass
class Counts:
    """What became of the rows."""

    rows: int = 0
    empty_output: int = 0
    """Dropped: there is no response to learn."""
    prompt_too_long: int = 0
    """Dropped: the prompt leaves no room for a token of the response."""
    response_cut: int = 0
    """Cut at the length limit, without the end token, and kept."""
    train: int = 0
    validation: int = 0

    def summary(self, max_length: int) -> str:
        return (
            f"{self.rows} rows: {self.train} to train on, {self.validation} to validate on. Dropped: "
            f"{self.empty_output} with an empty output, {self.prompt_too_long} whose prompt leaves no room in "
            f"{max_length} tokens. Cut at {max_length} tokens: {self.response_cut} responses."
        )


class InstructionRows(Dataset[dict[str, torch.Tensor]]):
    """`input_ids` of a row, and `labels`: the response and the end token, everything else -100."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        example = self.examples[item]
        ids = torch.from_numpy(example.ids.astype(np.int64))
        labels = ids.clone()
        labels[: example.prompt_length] = IGNORED
        return {"input_ids": ids, "labels": labels}


@dataclass(frozen=True)
class PadToLongest:
    """Pads a batch on the right to its longest row; by position, so that a pad id may be a token of the text too."""

    pad_id: int

    def __call__(self, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        shape = len(rows), max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": torch.full(shape, self.pad_id),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORED),
        }
        for index, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["input_ids"][index, :length] = row["input_ids"]
            batch["attention_mask"][index, :length] = 1
            batch["labels"][index, :length] = row["labels"]
        return batch


@dataclass(frozen=True)
class InstructionData:
    train: InstructionRows
    validation: InstructionRows
    prompt: PromptFormat
    counts: Counts

    @property
    def largest_id(self) -> int:
        return max(int(example.ids.max()) for rows in (self.train, self.validation) for example in rows.examples)


def load_instruction_data(
    dataset: str,
    dataset_config: str | None,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_length: int,
    validation_fraction: float,
    main_process_first: Callable[[], AbstractContextManager[Any]],
) -> InstructionData:
    """Reads the rows, encodes them, and keeps some for validation, chosen by a hash of their content.

    Raises `DataError` for whatever makes them unusable.
    """
    if not 0 < validation_fraction < 1:
        raise DataError(f"--validation_fraction {validation_fraction}: give a share such as 0.05.")
    if max_length < 2:
        raise DataError(f"--max_length {max_length}: at least 2, a token of a prompt and one of a response.")
    chosen = prompt_format(prompt, tokenizer)
    rows = read_rows(dataset, dataset_config, main_process_first)
    counts = Counts(rows=len(rows))
    train: list[Example] = []
    validation: list[Example] = []
    for row, example in encoded(rows, chosen, tokenizer, max_length, counts):
        held_out = share("\0".join(row)) < validation_fraction
        (validation if held_out else train).append(example)
    counts.train, counts.validation = len(train), len(validation)
    if not train and not validation:
        raise DataError(
            f"--dataset {dataset}: no usable row. {counts.summary(max_length)} Give rows with an output, or a larger "
            "--max_length."
        )
    if not train or not validation:
        raise DataError(
            f"--dataset {dataset}: of {len(train) + len(validation)} usable rows none is left for "
            f"{'validation' if train else 'training'}. Give more rows, or another --validation_fraction (now "
            f"{validation_fraction})."
        )
    return InstructionData(InstructionRows(train), InstructionRows(validation), chosen, counts)


def encoded(
    rows: list[Row], prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase, max_length: int, counts: Counts
) -> Iterator[tuple[Row, Example]]:
    """The usable rows and their ids; the others, and what was cut, go into `counts`."""
    for start in count(0, _ENCODE_BATCH):
        batch = rows[start : start + _ENCODE_BATCH]
        if not batch:
            return
        prompts = _prompt_ids([prompt.text(row) for row in batch], prompt, tokenizer)
        # verbose=False: what is longer than the model's context is cut below, and counted.
        responses = tokenizer(
            [row.output for row in batch], add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        for row, prompt_ids, response_ids in zip(batch, prompts, responses, strict=True):
            room = max_length - len(prompt_ids)
            if not row.output.strip() or not response_ids:
                counts.empty_output += 1
            elif room < 1:
                counts.prompt_too_long += 1
            else:
                ids = [*response_ids, prompt.end_id]
                counts.response_cut += len(ids) > room
                yield row, Example(np.asarray([*prompt_ids, *ids[:room]], dtype=np.int32), len(prompt_ids))


def _prompt_ids(texts: list[str], prompt: PromptFormat, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    found: list[list[int]] = tokenizer(texts, add_special_tokens=prompt.adds_special_tokens, verbose=False)["input_ids"]
    if prompt.adds_special_tokens:  # some tokenizers are set to add EOS as well, and the text goes on
        return [ids[:-1] if ids[-1] == tokenizer.eos_token_id else ids for ids in found]
    return found
