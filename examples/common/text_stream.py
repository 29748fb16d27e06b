"""Blocks of token ids that are made while training, with nothing cached."""

from itertools import islice
from typing import Any

import datasets

from .errors import DataError
from .text_corpora import open_stream, share, text_of
from .text_data import ENCODE_BATCH, TextData, TextOptions, encode
from .text_tokenizer import load_tokenizer

_SHUFFLE_BUFFER = 10_000  # documents


def stream_text_data(options: TextOptions, seed: int) -> TextData:
    """Blocks made while training, without end, nothing cached; `seed` is that of the shuffling buffer.

    What is left of a batch of documents after its last whole block is dropped, and so is a row without text.
    """
    if not options.max_eval_blocks:
        raise DataError("--max_eval_blocks 0 with --streaming: say how many, a stream has no known end.")
    stream = open_stream(options.dataset, options.dataset_config, options.text_column)
    tokenizer = load_tokenizer(options.tokenizer)
    column, size = options.text_column, options.block_size

    def has_text(row: dict[str, Any]) -> bool:
        return row[column] is not None and bool(text_of(row, column, f"a document of {options.dataset}").strip())

    def held_out(row: dict[str, str]) -> bool:
        return share(row[column]) < options.validation_fraction

    def pack(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for document in encode(tokenizer, rows[column]) for token in document]
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    def blocks_of(documents: datasets.IterableDataset) -> datasets.IterableDataset:
        return documents.map(pack, batched=True, batch_size=ENCODE_BATCH, remove_columns=[column])

    documents = stream.filter(has_text)
    training = documents.filter(lambda row: not held_out(row))
    validation = list(islice(blocks_of(documents.filter(held_out)), options.max_eval_blocks))
    if not validation:
        raise DataError(
            f"--dataset {options.dataset}: the documents kept for validation do not fill one block of "
            f"{size}. Raise --validation_fraction (now {options.validation_fraction})."
        )
    if next(iter(training), None) is None:
        raise DataError(
            f"--dataset {options.dataset}: all documents with text are kept for validation. Lower "
            f"--validation_fraction (now {options.validation_fraction})."
        )
    # Without an end: resuming finds its place by the number of batches, and no rank of several ends before others.
    endless = training.repeat(None).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    return TextData(options.dataset, "streamed", tokenizer, blocks_of(endless), datasets.Dataset.from_list(validation))
