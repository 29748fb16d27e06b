"""Blocks of token ids that are made while training, with nothing cached."""

from itertools import islice

import datasets

from .errors import DataError
from .text_corpora import open_stream, share
from .text_data import ENCODE_BATCH, TextData, TextOptions, encode
from .text_tokenizer import load_tokenizer

_SHUFFLE_BUFFER = 10_000  # documents


def stream_text_data(options: TextOptions, seed: int) -> TextData:
    """Blocks made while training, nothing cached; `seed` is that of the shuffling buffer.

    What is left of a batch of documents after its last whole block is dropped.
    """
    if not options.max_eval_blocks:
        raise DataError("--max_eval_blocks 0 with --streaming: say how many, a stream has no known end.")
    stream = open_stream(options.dataset, options.dataset_config, options.text_column)
    tokenizer = load_tokenizer(options.tokenizer)
    column, size = options.text_column, options.block_size

    def held_out(row: dict[str, str]) -> bool:
        return share(row[column]) < options.validation_fraction

    def pack(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for document in encode(tokenizer, rows[column]) for token in document]
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    def blocks_of(documents: datasets.IterableDataset) -> datasets.IterableDataset:
        return documents.map(pack, batched=True, batch_size=ENCODE_BATCH, remove_columns=[column])

    shuffled = stream.filter(lambda row: not held_out(row)).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    validation = list(islice(blocks_of(stream.filter(held_out)), options.max_eval_blocks))
    if not validation:
        raise DataError(
            f"--dataset {options.dataset}: the documents kept for validation do not fill one block of "
            f"{size}. Raise --validation_fraction (now {options.validation_fraction})."
        )
    return TextData(options.dataset, "streamed", tokenizer, blocks_of(shuffled), datasets.Dataset.from_list(validation))
