"""A causal language model with its tokenizer, or an adapter on its base."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from common.errors import ArgumentsError

ADAPTER = "adapter_config.json"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(
    name: str, base_model: str | None, dtype: str, device: torch.device
) -> tuple[Any, PreTrainedTokenizerBase, str | None]:
    """The model on its device, its tokenizer, and the base's name if it is an adapter.

    Args:
        name: hub id, folder of a model, or folder of an adapter.
        base_model: under an adapter, in place of the one that it names.
        dtype: of the weights; auto is as they were saved.
        device: where the model goes.

    Raises:
        ArgumentsError: there is no such model, tokenizer or base, or they do not go together.
    """
    adapter = (Path(name) / ADAPTER).is_file()
    base = _base_of(name, base_model) if adapter else name
    flag = "--base_model" if adapter else "--model"
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ArgumentsError(
            f"{flag} {base}: cannot be loaded as a causal language model ({_first_line(error)}). Give a folder or a "
            f"hub id of one{', as this adapter was trained on' if adapter else ''}."
        ) from error
    tokenizer = _load_tokenizer(name, base)
    if adapter:
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))  # the adapter was trained with tokens added
        try:
            model = PeftModel.from_pretrained(model, name)
        except (OSError, ValueError, RuntimeError) as error:
            raise ArgumentsError(
                f"--model {name}: this adapter does not go on {base} ({_first_line(error)}). Give the model it "
                f"was trained on with --base_model."
            ) from error
    return model.to(device), tokenizer, base if adapter else None


def _base_of(adapter: str, given: str | None) -> str:
    named = given or json.loads((Path(adapter) / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ArgumentsError(f"--model {adapter}: {ADAPTER} does not name its base model. Give it with --base_model.")
    return str(named)


def _load_tokenizer(model: str, base: str) -> PreTrainedTokenizerBase:
    """The model's own if it has one: an adapter's folder may hold that of its base with tokens added."""
    source = model if any((Path(model) / name).is_file() for name in TOKENIZER_FILES) else base
    local = Path(source).is_dir()
    try:
        # A folder without the files is no error to transformers: it makes an empty tokenizer from the model's config.
        if local and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
            raise OSError("no tokenizer files there")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ArgumentsError(
            f"--model {model}: no tokenizer can be loaded from {source} ({_first_line(error)}). Save the one it was "
            f"trained with there: tokenizer.save_pretrained(...)."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
