"""From rows of instruction, input and output to token ids of which only the response is learned.

The prompt and the response are tokenised apart, so that no token spans their border, and a model that is asked later
sees exactly the prompt's ids that it was trained with. A row is

    prompt (with BOS where the tokenizer adds one) | response | end token

and its labels are the response and the end token; everything else is -100. In a response, text that looks like a
special token is text.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from .text_corpora import DataError, reason, share

FIELDS = ("instruction", "input", "output")
PROMPTS = ("auto", "alpaca", "chat")
IGNORED = -100  # label of what is not learned

# The prompt of Stanford Alpaca, letter for letter: models finetuned elsewhere on such data expect this one.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_LOCAL_SUFFIXES = (".json", ".jsonl", ".ndjson")
_ENCODE_BATCH = 1000  # rows
_PROBE_QUESTION, _PROBE_ANSWER = "Which letters come first?", "First come A, B and C."


class Row(NamedTuple):
    instruction: str
    input: str
    output: str


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


@dataclass(frozen=True)
class PromptFormat:
    name: str
    text: Callable[[Row], str]
    end_id: int
    """The token after a response."""
    adds_special_tokens: bool
    """Whether the tokenizer adds its BOS, or the text has it."""


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


# --- Reading --------------------------------------------------------------------------------------


def read_rows(
    dataset: str, dataset_config: str | None, main_process_first: Callable[[], AbstractContextManager[Any]]
) -> list[Row]:
    """The rows of a JSON or JSONL file, or of the train split of a hub dataset."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return [_row(found, where) for where, found in _json_rows(path)]
    if path.is_dir() or looks_local(dataset) or path.suffix in _LOCAL_SUFFIXES:
        what = "is a folder" if path.is_dir() else f"no such file, seen from {Path.cwd()}"
        raise DataError(
            f"--dataset {dataset}: {what}. Give a JSON file (a list of rows), a JSONL file (a row a line), or a hub "
            "id such as tatsu-lab/alpaca."
        )
    with main_process_first():
        loaded = _from_hub(dataset, dataset_config)
    return [_row(found, f"{dataset}, row {number}") for number, found in enumerate(loaded, start=1)]


def looks_local(name: str) -> bool:
    """Whether this can only be a path: hub ids have one slash at most, between two names."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--dataset {path}: cannot be read as UTF-8 text ({error}).") from error
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(f"--dataset {path}: begins like a JSON list and is none ({error}).") from error
        yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            yield where, json.loads(line)
        except ValueError as error:
            raise DataError(
                f"--dataset: {where} is not JSON ({error}). Give a JSON list of rows, or one row a line."
            ) from error


def _from_hub(dataset: str, dataset_config: str | None) -> Any:
    try:
        return datasets.load_dataset(dataset, dataset_config, split="train")
    except Exception as error:  # the hub's client has a different class for each of the many ways to fail
        raise DataError(
            f"--dataset {dataset}: no file of that name here, and loading it from the hub failed: {reason(error)}. "
            "Give a JSON or JSONL file, or a hub id whose 'train' split can be loaded from here."
        ) from error


def _row(found: Any, where: str) -> Row:
    if not isinstance(found, dict):
        raise DataError(f"--dataset: {where} is a {type(found).__name__}, not an object with {', '.join(FIELDS)}.")
    if missing := [name for name in FIELDS if name not in found]:
        raise DataError(
            f"--dataset: {where} has no field {', '.join(map(repr, missing))}. The fields are: "
            f"{', '.join(map(str, found)) or 'none'}; needed are {', '.join(FIELDS)} (an input may be empty)."
        )
    values = ["" if found[name] is None and name != "instruction" else found[name] for name in FIELDS]
    for name, value in zip(FIELDS, values, strict=True):
        if not isinstance(value, str):
            raise DataError(f"--dataset: in {where} {name!r} is of type {type(value).__name__}, not text.")
        try:
            value.encode()
        except UnicodeEncodeError as error:  # JSON can write half a surrogate pair
            raise DataError(f"--dataset: in {where} {name!r} is not valid Unicode ({error}).") from error
    return Row(*values)


# --- Prompts --------------------------------------------------------------------------------------


def prompt_format(kind: str, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """`auto` is the tokenizer's chat template where it has one, and Alpaca's prompt otherwise."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if kind == "chat" and not has_template:
        raise DataError(
            f"--prompt chat: the tokenizer of {tokenizer.name_or_path} has no chat template. Use --prompt alpaca."
        )
    if kind == "chat" or (kind == "auto" and has_template):
        return _chat_format(tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"--prompt {kind}: the tokenizer of {tokenizer.name_or_path} has no EOS token, without which a model "
            "never learns to stop. Set one and save it, or take another tokenizer."
        )
    return PromptFormat("alpaca", _alpaca_text, tokenizer.eos_token_id, adds_special_tokens=True)


def _alpaca_text(row: Row) -> str:
    # Replaced, not formatted: an instruction may have braces.
    if not row.input.strip():
        return _ALPACA_WITHOUT_INPUT.replace("{instruction}", row.instruction)
    before, after = _ALPACA_WITH_INPUT.split("{input}")
    return before.replace("{instruction}", row.instruction) + row.input + after


def _chat_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    def render(question: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
        return tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)

    def text(row: Row) -> str:
        return render(f"{row.instruction}\n\n{row.input}" if row.input.strip() else row.instruction)

    where = f"--prompt chat: the chat template of {tokenizer.name_or_path}"
    try:
        prompt, whole = render(_PROBE_QUESTION), render(_PROBE_QUESTION, _PROBE_ANSWER)
    except Exception as error:  # templates are programs
        raise DataError(f"{where} fails: {reason(error)}. Use --prompt alpaca.") from error
    if not whole.startswith(prompt) or _PROBE_ANSWER not in whole[len(prompt) :]:
        raise DataError(
            f"{where} does not put the assistant's text behind the prompt that it makes for generation, so there is "
            "no prompt to train with. Use --prompt alpaca."
        )
    after = whole[len(prompt) :].partition(_PROBE_ANSWER)[2]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    end = next((token for token in ids if token in special), tokenizer.eos_token_id)
    if end is None:
        raise DataError(
            f"{where} ends the assistant's text with no special token, and there is no EOS token either: a model "
            "would never learn to stop. Set an EOS token and save it, or take another tokenizer."
        )
    return PromptFormat("chat", text, end, adds_special_tokens=False)


# --- Encoding -------------------------------------------------------------------------------------


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
