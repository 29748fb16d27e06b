"""A pretrained causal language model and its tokenizer, checked against the data; whole, or with a LoRA adapter."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .errors import ModelError, reason
from .instruction_data import InstructionData
from .instruction_rows import looks_local

ALL_LINEAR = "all-linear"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    if looks_local(name) and not Path(name).expanduser().is_dir():
        raise ModelError(f"--model {name}: no such folder, seen from {Path.cwd()}. Give one, or a hub id.")
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # a different class for each of the many ways to fail
        raise ModelError(
            f"--model {name}: its tokenizer could not be loaded: {reason(error)}. Give a folder with a saved model "
            "and its tokenizer, or a hub id that can be reached from here."
        ) from error


def load_model(name: str, dtype: str, max_length: int, data: InstructionData) -> PreTrainedModel:
    """The pretrained model, checked against the data, that stops where a response of the data ends."""
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype])
    except Exception as error:  # a different class for each of the many ways to fail
        raise ModelError(
            f"--model {name}: could not be loaded as a causal language model: {reason(error)}. Give a folder with a "
            "saved one, or a hub id that can be reached from here."
        ) from error
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise ModelError(f"--max_length {max_length}: {name} has {positions} positions. Give {positions} or less.")
    vocabulary = model.get_input_embeddings().num_embeddings
    largest = max(data.largest_id, data.prompt.end_id)
    if largest >= vocabulary:
        raise ModelError(
            f"--model {name}: its tokenizer gives the token {largest}, and the model has embeddings for {vocabulary}. "
            "Tokenizer and model do not belong together, or the model was not resized."
        )
    # transformers reads the kind of loss from the class's name, and finds none in some of them (GPT2LMHeadModel): the
    # Trainer then counts first tokens of rows, which nothing predicts.
    if model.loss_type is None:
        model.loss_type = "ForCausalLM"
    _prepare_generation(model, data.prompt.end_id)
    return model


def _prepare_generation(model: PreTrainedModel, end_id: int) -> None:
    config = model.generation_config
    if config is None:
        return
    known = config.eos_token_id
    stops = [known] if isinstance(known, int) else list(known or [])
    if end_id not in stops:
        config.eos_token_id = [*stops, end_id] if stops else end_id
    # transformers refuses to save a config that was changed and has sampling flags without sampling, as those of some
    # published models: that would be after the training.
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise ModelError(
            f"--model {model.name_or_path}: its generation_config.json could not be saved again with the model: "
            f"{' '.join(str(error).split())} Mend it there."
        ) from error


def pad_id(tokenizer: PreTrainedTokenizerBase, end_id: int, vocabulary: int) -> int:
    """Any id with an embedding serves, as padding is masked: the tokenizer's own where it has one."""
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id)
    return next((token for token in candidates if token is not None and token < vocabulary), end_id)


def add_lora(
    model: PreTrainedModel, rank: int, alpha: float, dropout: float, wanted: list[str], checkpointing: bool
) -> Any:
    """The model with an adapter on the modules of the `wanted` names; everything else is frozen.

    Raises:
        ModelError: a name is not there, or its module cannot take an adapter.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=ALL_LINEAR if wanted == [ALL_LINEAR] else wanted,
    )
    there = [name for name, _ in model.named_modules()]
    unmatched = [
        target
        for target in wanted
        if target != ALL_LINEAR and not any(name == target or name.endswith(f".{target}") for name in there)
    ]
    linear = {name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)}
    hint = f"The linear layers of {model.name_or_path} are {', '.join(sorted(linear))}; '{ALL_LINEAR}' takes all."
    if unmatched:
        raise ModelError(f"--lora_target_modules {' '.join(wanted)}: nothing is called {', '.join(unmatched)}. {hint}")
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(
            f"--lora_target_modules {' '.join(wanted)}: not all of it can take an adapter. {hint}"
        ) from error
    if checkpointing:  # a checkpointed segment needs an input with a gradient, and the embedding is frozen
        adapted.enable_input_require_grads()
    return adapted


def _is_linear(module: torch.nn.Module) -> bool:
    return type(module).__name__ in ("Linear", "Conv1D")
