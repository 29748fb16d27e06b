"""From documents to blocks of token ids, through a tokenizer and a cache.

The documents of a split are encoded, each ended by the tokenizer's EOS, and written into a file one by one.
A block is `block_size` consecutive ids of that file, so that one cache serves every block size. The cache is
keyed by the content of the corpus and by the tokenizer, and appears under its name when it is complete.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .cache import DEFAULT_CACHE, build_once
from .errors import DataError
from .text_corpora import (
    EMBEDDED,
    Corpus,
    Document,
    digest,
    hub_dataset,
    is_local,
    local_files,
    standard_library,
)
from .text_tokenizer import END_OF_TEXT, MIN_VOCAB, load_tokenizer, tokenizer_key, trained_tokenizer

ENCODE_BATCH = 256  # documents


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of `block_size` consecutive token ids of a file: `input_ids`, and the same as `labels`."""

    def __init__(self, path: Path, dtype: str, block_size: int, indices: list[int] | None = None) -> None:
        self.path, self.dtype, self.block_size = path, np.dtype(dtype), block_size
        available = path.stat().st_size // self.dtype.itemsize // block_size
        self.indices: list[int] | range = range(available) if indices is None else indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        # A read, not a memory map: it survives being sent to data loader workers.
        offset = self.indices[item] * self.block_size * self.dtype.itemsize
        block = np.fromfile(self.path, dtype=self.dtype, count=self.block_size, offset=offset)
        ids = torch.from_numpy(block.astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def evenly_spaced(self, limit: int) -> "TokenBlocks":
        """At most `limit` blocks (0: all), spread over the whole file."""
        if not 0 < limit < len(self):
            return self
        chosen = [self.indices[i * len(self) // limit] for i in range(limit)]
        return TokenBlocks(self.path, self.dtype.str, self.block_size, chosen)


@dataclass(frozen=True)
class TextData:
    name: str
    key: str
    tokenizer: PreTrainedTokenizerBase
    train: TokenBlocks | datasets.IterableDataset
    validation: TokenBlocks | datasets.Dataset


@dataclass(frozen=True)
class TextOptions:
    """What to read, and how to cut it; the fields are the script's arguments of the same names."""

    dataset: str
    dataset_config: str | None
    text_column: str
    tokenizer: str | None
    vocab_size: int
    block_size: int
    validation_fraction: float
    max_eval_blocks: int
    cache_dir: str | None

    def __post_init__(self) -> None:
        if self.block_size < 2:
            raise DataError(f"--block_size {self.block_size}: at least 2, a token to read and one to predict.")
        if not 0 < self.validation_fraction < 1:
            raise DataError(f"--validation_fraction {self.validation_fraction}: give a share such as 0.05.")
        if self.max_eval_blocks < 0:
            raise DataError(f"--max_eval_blocks {self.max_eval_blocks}: give 0 for all, or how many to use.")
        if self.vocab_size < MIN_VOCAB:
            raise DataError(
                f"--vocab_size {self.vocab_size}: a byte-level BPE needs at least {MIN_VOCAB} entries, all "
                f"bytes and {END_OF_TEXT}."
            )


def load_text_data(
    options: TextOptions, main_process_first: Callable[[], AbstractContextManager[Any]], show_progress: bool
) -> TextData:
    """Encodes the corpus, unless the cache has it, and cuts both splits into blocks.

    Raises `DataError` for whatever makes the corpus or its tokenizer unusable.
    """
    cache = Path(options.cache_dir).expanduser() if options.cache_dir else DEFAULT_CACHE
    with main_process_first():
        corpus = _open_corpus(options)
        if options.tokenizer is None and (options.dataset == EMBEDDED or is_local(options.dataset)):
            tokenizer = trained_tokenizer(corpus, options.vocab_size, cache, show_progress)
        else:
            tokenizer = load_tokenizer(options.tokenizer)
        folder = _encoded(corpus, tokenizer, cache, show_progress)
    train, validation = (_open_blocks(folder, split, options) for split in ("train", "validation"))
    return TextData(corpus.name, corpus.key, tokenizer, train, validation.evenly_spaced(options.max_eval_blocks))


def _open_corpus(options: TextOptions) -> Corpus:
    if options.dataset == EMBEDDED:
        return standard_library(options.validation_fraction)
    if is_local(options.dataset):
        return local_files(Path(options.dataset), options.text_column, options.validation_fraction)
    return hub_dataset(options.dataset, options.dataset_config, options.text_column, options.validation_fraction)


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: documents longer than the model's context are what blocks are for, not worth a warning.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, ENCODE_BATCH)):
        yield batch


def _encoded(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cache: Path, show_progress: bool) -> Path:
    """The folder with the token ids of both splits, made if it is not there yet."""
    folder = cache / f"tokens-{digest(corpus.key, tokenizer_key(tokenizer))[:16]}"
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")

    def build(target: Path) -> None:
        with (
            (target / "train.bin").open("wb") as train,
            (target / "validation.bin").open("wb") as validation,
            tqdm(desc=f"Tokenising {corpus.name}", unit=" documents", disable=not show_progress) as bar,
        ):
            for batch in _batches(corpus.documents()):
                ids = encode(tokenizer, [document.text for document in batch])
                for document, tokens in zip(batch, ids, strict=True):
                    (validation if document.held_out else train).write(np.asarray(tokens, dtype).tobytes())
                bar.update(len(batch))
        about = {"corpus": corpus.name, "key": corpus.key, "dtype": dtype.str}
        (target / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    build_once(folder, build)
    return folder


def _open_blocks(folder: Path, split: str, options: TextOptions) -> TokenBlocks:
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    blocks = TokenBlocks(folder / f"{split}.bin", about["dtype"], options.block_size)
    if not len(blocks):
        tokens = blocks.path.stat().st_size // blocks.dtype.itemsize
        raise DataError(
            f"--dataset {options.dataset}: its {split} split has {tokens} tokens, fewer than one block of "
            f"{options.block_size}. Give more text, a smaller --block_size, or another --validation_fraction "
            f"(now {options.validation_fraction})."
        )
    return blocks
