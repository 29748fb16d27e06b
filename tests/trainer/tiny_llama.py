"""A LLaMA of forty words, with its tokenizer, for what loads a model from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(40))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(WORDS), num_attention_heads=2, pad_token_id=0, **shape))


def counting(start: int) -> str:
    return " ".join(f"w{(start + i) % 40}" for i in range(6))


def save(folder: Path) -> str:
    """Model and tokenizer into the folder, whose name it returns."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)
