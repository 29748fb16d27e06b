"""Models to train from scratch: what is refused, and how they attend."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ViTConfig

from common.errors import ModelError
from common.gpt2_models import TINY, build_model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_as_asked_for(attention: str, tokenizer: PreTrainedTokenizerBase) -> None:
    assert build_model(TINY, tokenizer, 8, attention).config._attn_implementation == attention


@pytest.mark.parametrize("attention", ["fast", "flash_attention_2"])
def test_attention_that_is_not_there(attention: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match=f"--attn_implementation {attention}"):
        build_model(TINY, tokenizer, 8, attention)


def test_a_config_of_another_kind_of_model(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="ViTConfig, which is no causal language model"):
        build_model(str(tmp_path), tokenizer, 8)
