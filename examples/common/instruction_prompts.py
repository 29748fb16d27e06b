"""The prompt that a row becomes: Stanford Alpaca's, or the tokenizer's chat template."""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from .errors import DataError, reason
from .instruction_rows import Row

PROMPTS = ("auto", "alpaca", "chat")

# The prompt of Stanford Alpaca, letter for letter: models finetuned elsewhere on such data expect this one.
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_PROBE_QUESTION, _PROBE_ANSWER = "Which letters come first?", "First come A, B and C."


@dataclass(frozen=True)
class PromptFormat:
    name: str
    text: Callable[[Row], str]
    end_id: int
    """The token after a response."""
    adds_special_tokens: bool
    """Whether the tokenizer adds its BOS, or the text has it."""


def prompt_format(kind: str, tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    """`auto` is the tokenizer's chat template where it has one, and Alpaca's prompt otherwise."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if kind == "chat" and not has_template:
        raise DataError(
            f"--prompt chat: the tokenizer of {tokenizer.name_or_path} has no chat template. Use --prompt alpaca."
        )
    if kind == "chat" or (kind == "auto" and has_template):
        return _chat_format(tokenizer)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"--prompt {kind}: the tokenizer of {tokenizer.name_or_path} has no EOS token, without which a model "
            "never learns to stop. Set one and save it, or take another tokenizer."
        )
    return PromptFormat("alpaca", _alpaca_text, tokenizer.eos_token_id, adds_special_tokens=True)


def _alpaca_text(row: Row) -> str:
    # Replaced, not formatted: an instruction may have braces.
    if not row.input.strip():
        return _ALPACA_WITHOUT_INPUT.replace("{instruction}", row.instruction)
    before, after = _ALPACA_WITH_INPUT.split("{input}")
    return before.replace("{instruction}", row.instruction) + row.input + after


def _chat_format(tokenizer: PreTrainedTokenizerBase) -> PromptFormat:
    def render(question: str, answer: str | None = None) -> str:
        messages = [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}] if answer is not None else []
        return tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False)

    def text(row: Row) -> str:
        return render(f"{row.instruction}\n\n{row.input}" if row.input.strip() else row.instruction)

    where = f"--prompt chat: the chat template of {tokenizer.name_or_path}"
    try:
        prompt, whole = render(_PROBE_QUESTION), render(_PROBE_QUESTION, _PROBE_ANSWER)
    except Exception as error:  # templates are programs
        raise DataError(f"{where} fails: {reason(error)}. Use --prompt alpaca.") from error
    if not whole.startswith(prompt) or _PROBE_ANSWER not in whole[len(prompt) :]:
        raise DataError(
            f"{where} does not put the assistant's text behind the prompt that it makes for generation, so there is "
            "no prompt to train with. Use --prompt alpaca."
        )
    after = whole[len(prompt) :].partition(_PROBE_ANSWER)[2]
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    ids = tokenizer(after, add_special_tokens=False)["input_ids"]
    end = next((token for token in ids if token in special), tokenizer.eos_token_id)
    if end is None:
        raise DataError(
            f"{where} ends the assistant's text with no special token, and there is no EOS token either: a model "
            "would never learn to stop. Set an EOS token and save it, or take another tokenizer."
        )
    return PromptFormat("chat", text, end, adds_special_tokens=False)
