"""Which parameters are found to be hidden matrices, and how fused ones are cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import (
    CodeGenConfig,
    CodeGenForCausalLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    Phi3Config,
    Phi3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

from hf_dlion import hidden_matrices
from hf_dlion.optim.hidden import matrices_of
from tests.harness import run_workers

GPT2: dict[str, Any] = {
    "n_layer": 1,
    "n_embd": 12,
    "n_head": 2,
    "vocab_size": 20,
    "n_positions": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def found(model: torch.nn.Module, **options: Any) -> dict[str, list[tuple[int, ...]]]:
    """The matrices of each hidden parameter, by its name without the path."""
    return {
        name: [tuple(matrix.shape) for matrix in matrices_of(parameter, group["split"])]
        for group in hidden_matrices(model, **options)
        if group["orthogonal"]
        for name, parameter in group["params"]
    }


def names(matrices: dict[str, Any]) -> set[str]:
    return {name.removesuffix(".weight").rpartition(".")[2] for name in matrices}


def test_gpt2_has_a_tied_head_and_fused_weights_with_their_inputs_first() -> None:
    matrices = found(GPT2LMHeadModel(GPT2Config(**GPT2)))
    assert matrices == {
        "transformer.h.0.attn.c_attn.weight": [(12, 12)] * 3,
        "transformer.h.0.attn.c_proj.weight": [(12, 12)],
        "transformer.h.0.mlp.c_fc.weight": [(12, 48)],
        "transformer.h.0.mlp.c_proj.weight": [(48, 12)],
    }


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool) -> None:
    matrices = found(LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=tied)))
    assert names(matrices) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_phi_has_fewer_key_heads_in_a_fused_weight() -> None:
    matrices = found(Phi3ForCausalLM(Phi3Config(**LLAMA)))
    prefix = "model.layers.0."
    assert matrices[f"{prefix}self_attn.qkv_proj.weight"] == [(16, 16), (8, 16), (8, 16)]
    assert matrices[f"{prefix}mlp.gate_up_proj.weight"] == [(24, 16)] * 2
    assert len(matrices) == 4


def test_fused_weights_whose_heads_alternate_stay_whole() -> None:
    codegen = CodeGenForCausalLM(CodeGenConfig(vocab_size=20, n_embd=16, n_layer=1, n_head=4, rotary_dim=2))
    assert found(codegen)["transformer.h.0.attn.qkv_proj.weight"] == [(48, 16)]
    assert found(codegen, splits={"qkv_proj": [24, 24]})["transformer.h.0.attn.qkv_proj.weight"] == [(24, 16)] * 2
    for multi_query, cut in ((True, [(16, 16), (4, 16), (4, 16)]), (False, [(48, 16)])):
        config = GPTBigCodeConfig(vocab_size=20, n_embd=16, n_layer=1, n_head=4, multi_query=multi_query)
        assert found(GPTBigCodeForCausalLM(config))["transformer.h.0.attn.c_attn.weight"] == cut


def test_heads_of_classifiers_are_not_hidden() -> None:
    assert "score" not in names(found(GPT2ForSequenceClassification(GPT2Config(**GPT2))))
    sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    vit = ViTForImageClassification(ViTConfig(num_hidden_layers=1, num_attention_heads=4, **sizes))
    matrices = found(vit)
    assert len(matrices) == 6
    assert not any(part in name for name in matrices for part in ("classifier", "embeddings"))


def test_adapters_are_hidden_and_what_is_saved_whole_of_the_head_is_not() -> None:
    options = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    adapted = get_peft_model(LlamaForCausalLM(LlamaConfig(**LLAMA)), LoraConfig(**options, use_dora=True))
    matrices = found(adapted)
    assert sorted(matrices.values()) == [[(4, 16)], [(16, 4)]]
    assert all("self_attn.q_proj.lora_" in name for name in matrices)
    every = [parameter for group in hidden_matrices(adapted) for _, parameter in group["params"]]
    assert len(every) == len(set(every)) == sum(p.requires_grad for p in adapted.parameters())


def test_fused_weights_that_are_saved_whole_beside_adapters_are_cut_too() -> None:
    options = {"r": 4, "target_modules": ["o_proj"], "modules_to_save": ["qkv_proj", "gate_up_proj"]}
    adapted = get_peft_model(Phi3ForCausalLM(Phi3Config(**LLAMA)), LoraConfig(**options))
    matrices = {name.rpartition("layers.0.")[2]: cut for name, cut in found(adapted).items()}
    assert matrices["self_attn.qkv_proj.modules_to_save.default.weight"] == [(16, 16), (8, 16), (8, 16)]
    assert matrices["mlp.gate_up_proj.modules_to_save.default.weight"] == [(24, 16)] * 2
    assert len(matrices) == 4
    adapted.get_base_model().model.layers[0].self_attn.o_proj.base_layer.weight.requires_grad_(True)
    assert sum(name.endswith("o_proj.base_layer.weight") for name in found(adapted)) == 1


def test_gate_and_up_of_modernbert() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    matrices = found(ModernBertForMaskedLM(ModernBertConfig(**sizes, vocab_size=20, pad_token_id=0)))
    assert matrices["model.layers.0.mlp.Wi.weight"] == [(24, 16)] * 2
    assert matrices["model.layers.0.attn.Wqkv.weight"] == [(16, 16)] * 3


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(3, 24, 16))
        self.down_proj = torch.nn.Parameter(torch.zeros(3, 16, 12))


def test_plain_modules() -> None:
    model = torch.nn.ModuleDict(
        {
            "attention": torch.nn.MultiheadAttention(8, 2),
            "picture": torch.nn.Conv2d(3, 6, 5),
            "experts": Experts(),
            "qkv": torch.nn.Linear(8, 24),
            "words": torch.nn.Embedding(9, 8),
        }
    )
    matrices = found(model)
    assert matrices == {
        "attention.in_proj_weight": [(8, 8)] * 3,
        "attention.out_proj.weight": [(8, 8)],
        "picture.weight": [(6, 75)],
        "experts.gate_up_proj": [(12, 16)] * 6,
        "experts.down_proj": [(16, 12)] * 3,
        "qkv.weight": [(8, 8)] * 3,
    }
    assert "qkv.weight" not in found(model, others={"qkv.weight"})
    assert "qkv.weight" not in found(model, others="qkv.weight")
    with pytest.raises(ValueError, match="others has 'qkv', and the model has no parameter of that name"):
        found(model, others=["qkv", "words.weight"])
    assert found(model, splits={"qkv": [20, 4]})["qkv.weight"] == [(20, 8), (4, 8)]
    with pytest.raises(ValueError, match=r"splits has \[20, 5\] for 'qkv', whose outputs are 24"):
        found(model, splits={"qkv": [20, 5]})
    for other in ("attention.qkv", "picture"):
        with pytest.raises(ValueError, match=f"splits has '{other}', and the model has no linear layer of that name"):
            found(model, splits={other: [12, 12]})
    model["qkv"] = torch.nn.Linear(8, 12)  # perhaps of fewer key heads, perhaps not
    assert found(model)["qkv.weight"] == [(12, 8)]
    model["qkv"].weight.requires_grad_(False)
    assert "qkv.weight" not in found(model)


def test_banks_of_experts_with_their_inputs_first() -> None:
    text = Llama4TextConfig(hidden_size=8, intermediate_size=6, num_local_experts=2)
    assert found(torch.nn.ModuleList([Llama4TextExperts(text)])) == {
        "0.gate_up_proj": [(8, 6)] * 4,
        "0.down_proj": [(6, 8)] * 2,
    }


def sharded_one_by_one(rank: int) -> list[dict[str, list[tuple[int, ...]]]]:
    """What is found before and after each layer was sharded by itself."""
    gpt2 = GPT2LMHeadModel(GPT2Config(**GPT2))
    experts = GptOssExperts(GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=2))
    both = []
    for model, layers in ((gpt2, [gpt2.transformer.h[0].attn.c_attn]), (torch.nn.ModuleList([experts]), [experts])):
        both.append(found(model))
        for layer in layers:
            fully_shard(layer)
        both.append(found(model))
    return both


def test_layers_that_are_sharded_are_found_all_the_same() -> None:
    [(gpt2, sharded, experts, sharded_experts)] = run_workers(sharded_one_by_one, 1)
    assert gpt2 == sharded
    assert experts == sharded_experts
    assert experts["0.gate_up_proj"] == [(8, 16)] * 2  # gate and up alternate


def test_attention_with_keys_of_another_width() -> None:
    assert found(torch.nn.MultiheadAttention(8, 2, kdim=4, vdim=4)) == {
        "q_proj_weight": [(8, 8)],
        "k_proj_weight": [(8, 4)],
        "v_proj_weight": [(8, 4)],
        "out_proj.weight": [(8, 8)],
    }


def test_the_nearest_configuration_says_how_many_heads_there_are() -> None:
    phi = Phi3ForCausalLM(Phi3Config(**LLAMA))
    composite = torch.nn.ModuleDict({"language": phi.model, "eye": torch.nn.Linear(3, 3)})
    composite.config = LlamaConfig(**LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 2})  # type: ignore[assignment]
    matrices = found(composite)
    assert matrices["language.layers.0.self_attn.qkv_proj.weight"] == [(16, 16), (8, 16), (8, 16)]


def test_decay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    for group in hidden_matrices(model):
        assert group.get("weight_decay") == (None if group["orthogonal"] else 0.0)
    assert {group.get("weight_decay") for group in hidden_matrices(model, decayed={"1.weight"})} == {None, 0.0}
