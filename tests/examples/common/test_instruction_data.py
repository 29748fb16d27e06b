"""Instruction data: what is learned of a row, what becomes of the rows, and what is wrong with a file."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from common.errors import DataError
from common.instruction_data import (
    Counts,
    InstructionData,
    InstructionRows,
    PadToLongest,
    encoded,
    load_instruction_data,
)
from common.instruction_prompts import prompt_format
from common.instruction_rows import Row, read_rows

ROOT = Path(__file__).parents[3]

SHARED = ROOT.parent / "shared" / "data"
ALPACA_5K = SHARED / "instruct" / "alpaca_5k.json"
needs_data = pytest.mark.skipif(not ALPACA_5K.exists(), reason="needs real data and tokenizers, which are not here")

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_INPUT = Row("Add {both} numbers.", "1 and 2", "The sum is 3.")
WITHOUT_INPUT = Row("Name a colour.", "", "Blue")
ROWS = [
    WITH_INPUT,
    WITHOUT_INPUT,
    Row("Repeat.", " \n", " leading, trailing \n"),
    Row("Use {input} and {instruction}.", "{instruction}", "Done ### Response:"),
    Row("Write HTML.", "", "<s>struck</s> <|im_end|> out"),
    Row("Beyond ASCII, please: ä€", "日本", "Grüße 🙂 und 日本語"),
    Row("Tell a long story.", "", "Once upon a time there was a fox. " * 20),
]


def tiny_tokenizer(chat_template: str | None = None, **special: str | None) -> PreTrainedTokenizerBase:
    """A byte-level BPE that adds BOS, as LLaMA's does, and has no pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokens = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=tokens, initial_alphabet=bpe.pre_tokenizer.alphabet(), show_progress=False
    )
    bpe.train_from_iterator((text for row in ROWS for text in row), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    names = {"bos_token": "<s>", "eos_token": "</s>"} | special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.chat_template = chat_template
    return tokenizer


def encode(kind: str, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_length: int) -> Any:
    """The chosen prompt, (row, input ids, labels) of every usable row, and the counts."""
    prompt, counts = prompt_format(kind, tokenizer), Counts()
    kept = list(encoded(rows, prompt, tokenizer, max_length, counts))
    items = InstructionRows([example for _, example in kept])
    return prompt, [(row, items[i]["input_ids"], items[i]["labels"]) for i, (row, _) in enumerate(kept)], counts


def check_masking(kind: str, tokenizer: PreTrainedTokenizerBase, rows: list[Row], max_length: int) -> Counts:
    prompt, kept, counts = encode(kind, tokenizer, rows, max_length)
    cut = 0
    for row, ids, labels in kept:
        learned = labels != -100
        first = int(learned.nonzero()[0])
        assert len(ids) <= max_length
        assert learned[first:].all()
        assert torch.equal(ids[first:], labels[first:])
        # A model that is asked sees these ids: the tokenizer's own, of the prompt's text.
        assert ids[:first].tolist() == tokenizer(prompt.text(row), add_special_tokens=kind == "alpaca")["input_ids"]
        response = labels[learned].tolist()
        if response[-1] == prompt.end_id:
            response.pop()
            assert tokenizer.decode(response, clean_up_tokenization_spaces=False) == row.output
            assert not {*response} & {*tokenizer.all_special_ids, prompt.end_id}  # text that looks like one is text
        else:
            assert len(ids) == max_length
            cut += 1
            text = tokenizer.decode(response, clean_up_tokenization_spaces=False).rstrip("\ufffd")
            assert row.output.startswith(text)  # a character of several tokens may be cut in two
    assert cut == counts.response_cut
    return counts


# --- Masking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["alpaca", "chat"])
def test_labels_are_the_response_and_the_end_token(kind: str) -> None:
    tokenizer = tiny_tokenizer(CHATML)
    assert check_masking(kind, tokenizer, ROWS, 2000) == Counts()
    longest = max(len(ids) for _, ids, _ in encode(kind, tokenizer, ROWS, 2000)[1])
    for shorter in (1, 2, 50):
        assert check_masking(kind, tokenizer, ROWS, longest - shorter) == Counts(response_cut=1)


def test_a_response_that_just_fits_keeps_its_end_token() -> None:
    tokenizer = tiny_tokenizer()
    prompt, [(_, ids, _)], _ = encode("alpaca", tokenizer, [WITH_INPUT], 2000)
    for limit, cut in ((len(ids), 0), (len(ids) - 1, 1)):
        _, [(_, shorter, _)], counts = encode("alpaca", tokenizer, [WITH_INPUT], limit)
        assert torch.equal(shorter, ids[:limit])
        assert (counts.response_cut, int(shorter[-1]) == prompt.end_id) == (cut, not cut)


def test_prompts_letter_for_letter() -> None:
    tokenizer = tiny_tokenizer(CHATML)

    def prompt_text(kind: str, row: Row) -> str:
        _, [(_, ids, labels)], _ = encode(kind, tokenizer, [row], 2000)
        return tokenizer.decode(ids[labels == -100])

    begin = "<s>Below is an instruction that describes a task"
    assert prompt_text("alpaca", WITHOUT_INPUT) == (
        f"{begin}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:"
    )
    assert prompt_text("alpaca", WITH_INPUT) == (
        f"{begin}, paired with an input that provides further context. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\nAdd {both} numbers.\n\n### Input:\n1 and 2\n\n### Response:"
    )
    braces = prompt_text("alpaca", ROWS[3])
    assert braces.endswith("Use {input} and {instruction}.\n\n### Input:\n{instruction}\n\n### Response:")
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_text("chat", WITHOUT_INPUT) == chat.format("Name a colour.")
    assert prompt_text("chat", WITH_INPUT) == chat.format("Add {both} numbers.\n\n1 and 2")


def test_auto_is_the_chat_template_where_there_is_one_and_its_end_token() -> None:
    chat, alpaca = (prompt_format("auto", tiny_tokenizer(template)) for template in (CHATML, None))
    assert (chat.name, chat.end_id) == ("chat", 3)
    assert (alpaca.name, alpaca.end_id) == ("alpaca", 1)
    # A template without a special token behind the answer: EOS.
    assert prompt_format("chat", tiny_tokenizer(CHATML.replace("<|im_end|>", "[end]"))).end_id == 1


def test_an_eos_that_the_tokenizer_adds_to_the_prompt_is_taken_off() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    _, [(_, ids, _)], _ = encode("alpaca", tokenizer, [WITH_INPUT], 2000)
    assert (ids == 1).nonzero().flatten().tolist() == [len(ids) - 1]


@needs_data
@pytest.mark.parametrize("kind", ["alpaca", "chat"])
@pytest.mark.parametrize("name", ["stories260k", "gpt2_tokenizer"])
def test_masking_of_real_rows_by_real_tokenizers(name: str, kind: str) -> None:
    if name == "gpt2_tokenizer":
        file = str(SHARED / name / "tokenizer.json")
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=file, eos_token="<|endoftext|>")
        end = "<|endoftext|>"
    else:
        tokenizer, end = AutoTokenizer.from_pretrained(SHARED / name), "</s>"
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "").replace("<|im_end|>", end)
    rows = read_rows(str(ALPACA_5K), None, contextlib.nullcontext)
    assert len(rows) == 5000
    counts = check_masking(kind, tokenizer, rows, 256)
    assert counts.empty_output == 2
    assert counts.response_cut > 50


# --- Padding --------------------------------------------------------------------------------------


def test_a_batch_is_padded_to_its_longest_row_and_real_end_tokens_stay_labels() -> None:
    _, kept, _ = encode("alpaca", tiny_tokenizer(), ROWS[:3], 2000)
    items = [{"input_ids": ids, "labels": labels} for _, ids, labels in kept]
    batch = PadToLongest(pad_id=1)(items)  # the end token's
    longest = max(len(ids) for _, ids, _ in kept)
    for index, (_, ids, labels) in enumerate(kept):
        length = len(ids)
        assert batch["input_ids"][index].tolist() == ids.tolist() + [1] * (longest - length)
        assert batch["labels"][index].tolist() == labels.tolist() + [-100] * (longest - length)
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (longest - length)
        assert batch["labels"][index, length - 1] == 1


# --- Rows and files -------------------------------------------------------------------------------


def write(path: Path, rows: list[Any], lines: bool = False) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows)
    path.write_text(text)
    return str(path)


def many(count: int = 100) -> list[dict[str, str]]:
    return [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(count)]


def load(dataset: str, **changes: Any) -> InstructionData:
    options: dict[str, Any] = {"prompt": "alpaca", "max_length": 512, "validation_fraction": 0.2}
    tokenizer = changes.pop("tokenizer", None) or tiny_tokenizer()
    return load_instruction_data(
        dataset, None, tokenizer, main_process_first=contextlib.nullcontext, **options | changes
    )


def test_rows_are_dropped_cut_and_counted(tmp_path: Path) -> None:
    long, none = "word " * 600, {"instruction": "Nothing.", "input": None, "output": None}
    odd = [
        {"instruction": "A", "input": "", "output": ""},
        {"instruction": "B", "input": "", "output": " \n\t"},
        none,
        {"instruction": "C", "input": long, "output": "yes"},
        {"instruction": "D", "input": "", "output": long},
    ]
    data = load(write(tmp_path / "rows.json", many() + odd), max_length=300)
    counts = data.counts
    assert (counts.rows, counts.empty_output, counts.prompt_too_long, counts.response_cut) == (105, 3, 1, 1)
    assert counts.train + counts.validation == 101
    assert (counts.train, counts.validation) == (len(data.train), len(data.validation))


@pytest.mark.parametrize(("name", "lines"), [("a.json", False), ("a.jsonl", True), ("lines.json", True)])
def test_json_is_a_list_or_a_row_a_line(name: str, lines: bool, tmp_path: Path) -> None:
    rows = [*many(2), {"instruction": "i", "input": "x\u2028y", "output": "o", "category": "more"}]
    path = tmp_path / name
    if lines:
        path.write_text("\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    else:
        write(path, rows)
    expected = [Row(row["instruction"], row["input"], row["output"]) for row in rows]
    assert read_rows(str(path), None, contextlib.nullcontext) == expected


def test_validation_rows_depend_on_their_content_alone(tmp_path: Path) -> None:
    def held_out(rows: list[dict[str, str]]) -> set[tuple[int, ...]]:
        data = load(write(tmp_path / "rows.json", rows))
        train, validation = (
            {tuple(example.ids.tolist()) for example in part.examples} for part in (data.train, data.validation)
        )
        assert train.isdisjoint(validation)
        assert 10 < len(validation) < 30
        return validation

    assert held_out(many()) == held_out(many()[::-1] + many())


ROW = {"instruction": "a", "input": "", "output": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([ROW, {"instruction": "a", "output": "b"}], "row 2 has no field 'input'.*instruction, output"),
        ([{"prompt": "a", "completion": "b"}], "row 1 has no field 'instruction', 'input', 'output'"),
        ([ROW, ["a", "b"]], "row 2 is a list"),
        ([ROW, {**ROW, "output": 7}], "row 2 'output' is of type int"),
        ([{**ROW, "instruction": None}], "'instruction' is of type NoneType"),
        ([{**ROW, "output": "\ud800"}], "not valid Unicode"),
        ([], "no usable row"),
        ([{**ROW, "output": ""}], "no usable row.*1 with an empty output"),
        ([{**ROW, "input": "long " * 600}], "no usable row.*1 whose prompt leaves no room"),
        ([ROW], "none is left for"),
        ('{"rows": [\n]}', "line 1 is not JSON"),
        ("[1, 2", "begins like a JSON list"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_wrong_rows_are_named(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    if isinstance(content, list):
        write(path, content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load(str(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "/nowhere/rows.json"}, "no such file"),
        ({"dataset": "rows.jsonl"}, "no such file"),
        ({"dataset": str(ROOT)}, "is a folder"),
        ({"max_length": 1}, "--max_length 1"),
        ({"validation_fraction": 1.0}, "--validation_fraction 1.0"),
        ({"prompt": "chat"}, "no chat template.*--prompt alpaca"),
        ({"tokenizer": {"eos_token": None}}, "no EOS token"),
        ({"prompt": "chat", "tokenizer": {"chat_template": "{{ nothing.there }}"}}, "fails.*--prompt alpaca"),
        ({"prompt": "chat", "tokenizer": {"chat_template": "{{ messages|length }} said"}}, "does not put"),
        (
            {"prompt": "chat", "tokenizer": {"chat_template": CHATML.replace("<|im_end|>", ""), "eos_token": None}},
            "no special token, and there is no EOS",
        ),
    ],
)
def test_what_cannot_be_used_is_an_error(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    dataset = changes.pop("dataset", None) or write(tmp_path / "rows.json", many())
    tokenizer = tiny_tokenizer(**changes.pop("tokenizer", {}))
    with pytest.raises(DataError, match=message):
        load(dataset, tokenizer=tokenizer, **changes)
