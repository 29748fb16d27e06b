"""The tokenizer of a text: a pretrained one, or a byte-level BPE trained on it."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .cache import build_once
from .errors import DataError, reason
from .text_corpora import Corpus, digest

HUB_TOKENIZER = "gpt2"
END_OF_TEXT = "<|endoftext|>"
MIN_VOCAB = 256 + 1  # all bytes, and END_OF_TEXT


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
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


def trained_tokenizer(corpus: Corpus, vocab_size: int, cache: Path, show_progress: bool) -> PreTrainedTokenizerBase:
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

    build_once(folder, build)
    return load_tokenizer(str(folder))


def tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = sorted(tokenizer.get_vocab().items())
    return digest(backend.to_str() if backend is not None else json.dumps(vocabulary), str(tokenizer.eos_token_id))
