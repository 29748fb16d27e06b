"""Models to train from scratch, by name: GPT-2, its LLaMA-style variant, or the config of any causal LM."""

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .errors import ModelError

TINY = "gpt2-tiny"
MINI = "gpt2-mini"
TEN = "gpt2-10m"
# name: layers, heads, width
GPT2_SIZES = {
    TINY: (4, 4, 128),
    MINI: (6, 5, 160),
    TEN: (12, 4, 256),
    "gpt2": (12, 12, 768),
    "gpt2-medium": (24, 16, 1024),
    "gpt2-large": (36, 20, 1280),
    "gpt2-xl": (48, 25, 1600),
}
# name: layers, heads, width, inner width. "GPT2++" of arXiv 2404.00438, GPT-2 with RMSNorm, SwiGLU and rotary
# positions. Only the totals are the paper's; with GPT-2's vocabulary, tied, these come to 355 M and 757 M.
GPT2PP_SIZES = {
    "gpt2pp-350m": (24, 16, 1024, 2752),
    "gpt2pp-760m": (24, 16, 1536, 4096),
}
NAMES = (*GPT2_SIZES, *GPT2PP_SIZES)

GPT2_CONTEXT = 1024


def build_model(
    name: str, tokenizer: PreTrainedTokenizerBase, block_size: int, attention: str | None = None
) -> PreTrainedModel:
    """A freshly initialised model of this name, hub id or path, with the tokenizer's vocabulary.

    Args:
        attention: transformers' `attn_implementation`; None is the model's own choice.
    """
    config = _config(name, block_size)
    config.vocab_size = len(tokenizer)
    config.bos_token_id = tokenizer.bos_token_id
    config.eos_token_id = tokenizer.eos_token_id
    config.pad_token_id = tokenizer.pad_token_id
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and context < block_size:
        raise ModelError(
            f"--block_size {block_size}: {name} has {context} positions. Give --block_size {context} or less."
        )
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    except ImportError as error:
        raise ModelError(f"--model {name} with --attn_implementation {attention}: {error}") from error
    except ValueError as error:
        if attention is not None and "attn_implementation" in str(error):
            raise ModelError(f"--attn_implementation {attention}: {error}") from error
        raise ModelError(
            f"--model {name}: its config is a {type(config).__name__}, which is no causal language model. "
            f"Give one that is, or one of {', '.join(NAMES)}."
        ) from error
    # transformers reads the kind of loss from the class's name, and finds none in GPT2LMHeadModel: the Trainer then
    # counts the first token of a block, which nothing predicts, and all losses are too small by 1 / block_size.
    if model.loss_type is None:
        model.loss_type = "ForCausalLM"
    model.config.use_cache = False  # a key-value cache is for generation; generate() turns it on again
    return model


def _config(name: str, block_size: int) -> PretrainedConfig:
    # The small ones have no positions beyond the block: they would be weights voted on and never trained.
    context = block_size if name in (TINY, MINI, TEN) else max(block_size, GPT2_CONTEXT)
    if name in GPT2_SIZES:
        layers, heads, width = GPT2_SIZES[name]
        # No dropout: a pretraining run hardly sees a token twice.
        return GPT2Config(
            n_layer=layers,
            n_head=heads,
            n_embd=width,
            n_positions=context,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    if name in GPT2PP_SIZES:
        layers, heads, width, inner = GPT2PP_SIZES[name]
        return LlamaConfig(
            num_hidden_layers=layers,
            num_attention_heads=heads,
            hidden_size=width,
            intermediate_size=inner,
            max_position_embeddings=context,
            tie_word_embeddings=True,
        )
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # the hub's client raises a different class for each of the many ways to fail
        raise ModelError(
            f"--model {name}: not one of {', '.join(NAMES)}, and no config could be loaded there: {error}"
        ) from error
