"""From documents to blocks of token ids, through a tokenizer and a cache.

The documents of a split are encoded, each ended by the tokenizer's EOS, and written into a file one by one.
A block is `block_size` consecutive ids of that file, so that one cache serves every block size. The cache is
keyed by the content of the corpus and by the tokenizer, and appears under its name when it is complete.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .text_corpora import (
    EMBEDDED,
    Corpus,
    DataError,
    Document,
    digest,
    hub_dataset,
    is_local,
    local_files,
    open_stream,
    reason,
    share,
    standard_library,
)

DEFAULT_CACHE = Path(HF_HOME) / "hf_dlion"
HUB_TOKENIZER = "gpt2"
END_OF_TEXT = "<|endoftext|>"

_MIN_VOCAB = 256 + 1  # all bytes, and END_OF_TEXT
_ENCODE_BATCH = 256  # documents
_SHUFFLE_BUFFER = 10_000  # documents


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
        if self.vocab_size < _MIN_VOCAB:
            raise DataError(
                f"--vocab_size {self.vocab_size}: a byte-level BPE needs at least {_MIN_VOCAB} entries, all "
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
            tokenizer = _trained_tokenizer(corpus, options.vocab_size, cache, show_progress)
        else:
            tokenizer = _load_tokenizer(options.tokenizer)
        folder = _encoded(corpus, tokenizer, cache, show_progress)
    train, validation = (_open_blocks(folder, split, options) for split in ("train", "validation"))
    return TextData(corpus.name, corpus.key, tokenizer, train, validation.evenly_spaced(options.max_eval_blocks))


def _open_corpus(options: TextOptions) -> Corpus:
    if options.dataset == EMBEDDED:
        return standard_library(options.validation_fraction)
    if is_local(options.dataset):
        return local_files(Path(options.dataset), options.text_column, options.validation_fraction)
    return hub_dataset(options.dataset, options.dataset_config, options.text_column, options.validation_fraction)


# --- Tokenizers -----------------------------------------------------------------------------------


def _load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    asked = f"--tokenizer {name}" if name else f"the tokenizer taken without --tokenizer, {HUB_TOKENIZER}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name or HUB_TOKENIZER)
    except Exception as error:  # a different class for each of the many ways to fail
        raise DataError(
            f"{asked}: could not be loaded: {reason(error)}. Give --tokenizer a folder with a saved "
            "tokenizer, or a hub id that can be reached from here."
        ) from error
    if tokenizer.eos_token_id is None and END_OF_TEXT in tokenizer.get_vocab():
        tokenizer.eos_token = END_OF_TEXT
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{asked}: it has no EOS token, which is what stands between documents. Set one and save it, or "
            "take another tokenizer."
        )
    return tokenizer


def _trained_tokenizer(corpus: Corpus, vocab_size: int, cache: Path, show_progress: bool) -> PreTrainedTokenizerBase:
    """A byte-level BPE of `vocab_size` entries, trained on the training split only."""
    folder = cache / f"tokenizer-{digest(corpus.key, str(vocab_size))[:16]}"

    def build(target: Path) -> None:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=show_progress,
        )
        bpe.train_from_iterator((d.text for d in corpus.documents() if not d.held_out), trainer)
        wrapped = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)
        wrapped.save_pretrained(target)

    _build_once(folder, build)
    return _load_tokenizer(str(folder))


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items())
    return digest(backend.to_str() if backend is not None else json.dumps(vocabulary), str(tokenizer.eos_token_id))


# --- From documents to blocks ---------------------------------------------------------------------


def _build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Fills `folder` unless it exists. Other processes see it complete or not at all."""
    if folder.exists():
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        working = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(f"--cache_dir {folder.parent}: cannot be written to ({error}). Give another.") from error
    try:
        build(working)
        working.chmod(0o755)  # mkdtemp leaves it to the owner alone
        working.rename(folder)
    except OSError:
        if not folder.exists():  # otherwise another process was first, with the same content
            raise
    finally:
        shutil.rmtree(working, ignore_errors=True)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    # verbose=False: documents longer than the model's context are what blocks are for, not worth a warning.
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [[*ids, tokenizer.eos_token_id] for ids in encoded["input_ids"]]


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while batch := list(islice(iterator, _ENCODE_BATCH)):
        yield batch


def _encoded(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, cache: Path, show_progress: bool) -> Path:
    """The folder with the token ids of both splits, made if it is not there yet."""
    folder = cache / f"tokens-{digest(corpus.key, _tokenizer_key(tokenizer))[:16]}"
    dtype = np.dtype("<u2" if len(tokenizer) <= 2**16 else "<u4")

    def build(target: Path) -> None:
        with (
            (target / "train.bin").open("wb") as train,
            (target / "validation.bin").open("wb") as validation,
            tqdm(desc=f"Tokenising {corpus.name}", unit=" documents", disable=not show_progress) as bar,
        ):
            for batch in _batches(corpus.documents()):
                ids = _encode(tokenizer, [document.text for document in batch])
                for document, tokens in zip(batch, ids, strict=True):
                    (validation if document.held_out else train).write(np.asarray(tokens, dtype).tobytes())
                bar.update(len(batch))
        about = {"corpus": corpus.name, "key": corpus.key, "dtype": dtype.str}
        (target / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    _build_once(folder, build)
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


# --- Streaming ------------------------------------------------------------------------------------


def stream_text_data(options: TextOptions, seed: int) -> TextData:
    """Blocks made while training, nothing cached; `seed` is that of the shuffling buffer.

    What is left of a batch of documents after its last whole block is dropped.
    """
    if not options.max_eval_blocks:
        raise DataError("--max_eval_blocks 0 with --streaming: say how many, a stream has no known end.")
    stream = open_stream(options.dataset, options.dataset_config, options.text_column)
    tokenizer = _load_tokenizer(options.tokenizer)
    column, size = options.text_column, options.block_size

    def held_out(row: dict[str, str]) -> bool:
        return share(row[column]) < options.validation_fraction

    def pack(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = [token for document in _encode(tokenizer, rows[column]) for token in document]
        blocks = [ids[i : i + size] for i in range(0, len(ids) - size + 1, size)]
        return {"input_ids": blocks, "labels": blocks}

    def blocks_of(documents: datasets.IterableDataset) -> datasets.IterableDataset:
        return documents.map(pack, batched=True, batch_size=_ENCODE_BATCH, remove_columns=[column])

    shuffled = stream.filter(lambda row: not held_out(row)).shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER)
    validation = list(islice(blocks_of(stream.filter(held_out)), options.max_eval_blocks))
    if not validation:
        raise DataError(
            f"--dataset {options.dataset}: the documents kept for validation do not fill one block of "
            f"{size}. Raise --validation_fraction (now {options.validation_fraction})."
        )
    return TextData(options.dataset, "streamed", tokenizer, blocks_of(shuffled), datasets.Dataset.from_list(validation))
