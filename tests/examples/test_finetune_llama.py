"""The finetuning example: its validation loss, whole and LoRA runs of two processes, and its errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback

import finetune_llama
from common.arguments import parse_arguments
from common.errors import ArgumentsError, DataError, ModelError
from common.pretrained import pad_id
from finetune_llama import DEFAULTS, ScriptArguments, build_trainer
from hf_dlion import DLionTrainer, DLionTrainingArguments
from tests.examples.common.test_instruction_data import CHATML, many, tiny_tokenizer, write
from tests.harness import run_workers
from tests.trainer.tiny import act_as_launched

ROOT = Path(__file__).parents[2]

QUIET = ["--use_cpu", "--report_to", "none", "--disable_tqdm", "True", "--logging_steps", "1"]
ADAPTER_AND_BASE = "weights.pt"


def make_model(folder: Path, chat_template: str | None = None, **changes: Any) -> str:
    """A random LLaMA of a few thousand parameters, with its tokenizer."""
    tokenizer = tiny_tokenizer(chat_template)
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape | changes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def make_files(folder: Path, chat_template: str | None = None, **changes: Any) -> list[str]:
    """Arguments with a model and data of 60 rows, of which 12 are held out; responses differ in length."""
    rows = [row | {"output": row["output"] * (1 + i % 5)} for i, row in enumerate(many(60))]
    model = make_model(folder / "model", chat_template, **changes)
    data = write(folder / "rows.json", rows)
    return ["--model", model, "--dataset", data, "--validation_fraction", "0.2", "--output_dir", str(folder / "out")]


def build(argv: list[str]) -> tuple[DLionTrainer, Any]:
    sys.argv = ["finetune_llama.py", *QUIET, *argv]
    return build_trainer(*parse_arguments([ScriptArguments, DLionTrainingArguments], "doc", DEFAULTS))


@pytest.fixture(autouse=True)
def _keep_argv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)


def main_as_rank(rank: int, argv: list[str], callback: type[TrainerCallback] | None = None) -> None:
    """The whole script in a worker of the harness."""
    os.environ["OMP_NUM_THREADS"] = "1"
    act_as_launched(rank)
    sys.argv = ["finetune_llama.py", *QUIET, *argv]
    if callback is not None:
        before = finetune_llama.RestoreCache
        finetune_llama.RestoreCache = type("Both", (callback, before), {})  # type: ignore[misc]
    finetune_llama.main()


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "results.json").read_text())
    return found


# --- Validation loss ------------------------------------------------------------------------------


def evaluate_as_rank(rank: int, argv: list[str]) -> tuple[float, tuple[int, ...]]:
    os.environ["OMP_NUM_THREADS"] = "1"
    act_as_launched(rank)
    trainer, data = build(argv)
    output = trainer.predict(data.validation, metric_key_prefix="eval")
    return output.metrics["eval_response_loss"], output.predictions.shape


def test_the_validation_loss_is_exact_whatever_the_batches_and_processes(tmp_path: Path) -> None:
    argv = make_files(tmp_path)
    trainer, data = build(argv)
    model = trainer.model.eval().requires_grad_(False)
    total, tokens = 0.0, 0
    for index in range(len(data.validation)):
        row = data.validation[index]
        logits = model(input_ids=row["input_ids"][None]).logits[0].double().log_softmax(-1)
        for position, label in enumerate(row["labels"].tolist()):
            if label != -100:
                total, tokens = total - float(logits[position - 1, label]), tokens + 1
    rows = len(data.validation)
    assert rows == 12  # 5 and 5, and then 2 for two processes
    for size in (1, 5):
        trainer, _ = build([*argv, "--per_device_eval_batch_size", str(size)])
        assert trainer.evaluate()["eval_response_loss"] == pytest.approx(total / tokens, rel=1e-6)
    for loss, shape in run_workers(evaluate_as_rank, 2, [*argv, "--per_device_eval_batch_size", "5"]):
        assert loss == pytest.approx(total / tokens, rel=1e-6)
        assert shape == (rows, 2)  # what was gathered: no logits


# --- Whole runs -----------------------------------------------------------------------------------


def test_two_processes_finetune_resume_and_generate(tmp_path: Path) -> None:
    argv = make_files(tmp_path, CHATML)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/launch/cpu_2.yaml"]
    more = ["--optim", "dlion_mavo", "--learning_rate", "1e-3", "--per_device_train_batch_size", "4", "--bf16"]
    run = [*launch, "examples/finetune_llama.py", *QUIET, *argv, *more, "--save_steps", "4", "--max_steps", "8"]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "Prompt: chat. 60 rows: 48 to train on, 12 to validate on." in done.stdout
    found = results(tmp_path)
    assert (found["workers"], found["method"], found["steps"]) == (2, "dlion_mavo", 8)
    assert found["validation_loss_last"] < found["validation_loss_first"] - 0.1
    assert found["row_counts"]["validation"] == 12
    for folder in ("out", "out/checkpoint-4"):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / folder)
        chat = [{"role": "user", "content": "Say 3."}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = model.generate(**prompt, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        assert written.past_key_values is not None
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == [1, 3]  # the base's, and the end of a turn

    resume = ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-4"), "--max_steps", "5"]
    run_workers(main_as_rank, 2, [*argv, *more, *resume])
    assert (results(tmp_path)["steps"], results(tmp_path)["bytes_counted_steps"]) == (5, 1)


class KeepWeights(TrainerCallback):
    """Every weight as it was before the training, and after each step."""

    weights: list[dict[str, torch.Tensor]] = []  # noqa: RUF012 - a worker process has one

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append({name: value.detach().clone() for name, value in kwargs["model"].named_parameters()})

    on_step_end = on_train_begin


def lora_as_rank(rank: int, argv: list[str]) -> list[dict[str, torch.Tensor]]:
    main_as_rank(rank, argv, KeepWeights)
    return KeepWeights.weights


LORA = [
    "--lora_r",
    "2",
    "--lora_dropout",
    "0",
    "--optim",
    "dlion_mavo",
    "--learning_rate",
    "1e-3",
    "--warmup_steps",
    "0",
]


def test_lora_votes_on_the_adapter_and_on_nothing_else(tmp_path: Path) -> None:
    argv = make_files(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(argv[1]).state_dict()
    first, second = run_workers(lora_as_rank, 2, [*argv, *LORA, "--max_steps", "4", "--weight_decay", "0"])
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    before, once, last = first[0], first[1], first[-1]
    adapter = {name for name in before if "lora_" in name}
    for name, value in before.items():
        if name not in adapter:
            assert torch.equal(value, last[name])
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(value, base[plain])
        elif "lora_A" in name:
            assert torch.equal(value, once[name])  # its gradient is 0 while B is: split votes, which move nothing
            assert not torch.equal(value, last[name])
        else:
            assert not value.any()
            assert once[name].any()

    found = results(tmp_path)
    assert found["trainable_parameters"] == sum(before[name].numel() for name in adapter)
    bits = 8 * found["bytes_sent"] / found["trainable_parameters"] / found["bytes_counted_steps"]
    assert 1 <= bits < 1.5  # and some bytes that check that the workers agree
    assert found["lora"]["lora_r"] == 2


def test_a_lora_adapter_loads_merges_and_generates(tmp_path: Path) -> None:
    argv = make_files(tmp_path)
    more = ["--gradient_checkpointing", "--gradient_accumulation_steps", "2", "--dtype", "bfloat16"]
    few = ["--lora_target_modules", "q_proj", "v_proj", "--max_steps", "3"]
    run_workers(main_as_rank, 2, [*argv, *LORA, *more, *few])
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(argv[1]), tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    prompt = tokenizer("Say 3.", return_tensors="pt")
    with torch.no_grad():
        adapted = loaded(**prompt).logits
        with loaded.disable_adapter():
            assert not torch.allclose(adapted, loaded(**prompt).logits)
        assert loaded.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
        torch.testing.assert_close(loaded.merge_and_unload()(**prompt).logits, adapted)
    saved = (tmp_path / "out" / "adapter_model.safetensors").stat().st_size
    assert saved < (tmp_path / "model" / "model.safetensors").stat().st_size / 4


# --- The model as it is loaded --------------------------------------------------------------------


def test_padding_takes_an_id_that_has_an_embedding() -> None:
    for special, expected in (({}, 1), ({"unk_token": "<|im_start|>"}, 2), ({"pad_token": "<|im_end|>"}, 3)):
        assert pad_id(tiny_tokenizer(**special), 1, vocabulary=300) == expected
    assert pad_id(tiny_tokenizer(pad_token="<pad>", unk_token="<s>"), 1, vocabulary=10) == 0


def test_a_generation_config_that_could_not_be_saved_is_mended_or_an_error(tmp_path: Path) -> None:
    argv = make_files(tmp_path, CHATML)  # whose end token is new to the config
    path = tmp_path / "model" / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"temperature": 0.5, "do_sample": False}))
    trainer, _ = build(argv)
    trainer.save_model()
    assert (tmp_path / "out" / "model.safetensors").exists()
    path.write_text(json.dumps(config | {"num_beams": 1, "length_penalty": 2.0}))
    with pytest.raises(ModelError, match="generation_config.json.*length_penalty"):
        build(argv)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (["--model", "/nowhere/model"], ModelError, "/nowhere/model: no such folder"),
        (["--dataset", "nowhere.json"], DataError, "nowhere.json: no such file"),
        (["--max_length", "600"], ModelError, "has 512 positions. Give 512 or less"),
        (["--lora_r", "4", "--lora_target_modules", "c_attn"], ModelError, "nothing is called c_attn.*q_proj"),
        (["--lora_r", "4", "--lora_target_modules", "q_proj", "qproj"], ModelError, "nothing is called qproj"),
        (
            ["--lora_r", "4", "--lora_target_modules", "mlp"],
            ModelError,
            "--lora_target_modules mlp: not all of it can take",
        ),
        (["--lora_r", "-1"], ArgumentsError, "--lora_r -1"),
        (["--lora_r", "4", "--lora_dropout", "1"], ArgumentsError, "--lora_dropout 1"),
    ],
)
def test_what_cannot_be_trained_is_an_error_before_training(
    changes: list[str], error: type[Exception], message: str, tmp_path: Path
) -> None:
    argv = make_files(tmp_path, max_position_embeddings=512)
    with pytest.raises(error, match=message):
        build([*argv, *changes])


def test_a_tokenizer_of_another_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="embeddings for 50"):
        build(make_files(tmp_path, vocab_size=50))


def test_a_model_that_is_none_is_an_error(tmp_path: Path) -> None:
    argv = make_files(tmp_path)
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="could not be loaded as a causal language model"):
        build(argv)


def test_a_recipe_with_a_wrong_choice_is_an_error(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("prompt: vicuna\n")
    with pytest.raises(ArgumentsError, match="--prompt vicuna: it is one of auto, alpaca, chat"):
        build([*make_files(tmp_path), "--config", str(recipe)])


def test_a_bare_no_in_a_recipe_is_no(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("save_strategy: no\nbf16: no\nmodel: some/model\n")
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(recipe), "--use_cpu", "--output_dir", str(tmp_path)])
    _, args = parse_arguments([ScriptArguments, DLionTrainingArguments], "doc", DEFAULTS)
    assert (args.save_strategy, args.bf16) == ("no", False)


@pytest.mark.parametrize("recipe", sorted((ROOT / "examples/recipes").glob("llama*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_read(recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    argv = ["finetune_llama.py", "--config", str(recipe), "--use_cpu", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    script_args, args = parse_arguments([ScriptArguments, DLionTrainingArguments], "doc", DEFAULTS)
    assert args.votes
    assert args.num_train_epochs == 3
    assert (script_args.lora_r > 0) == ("lora" in recipe.stem)


def test_an_error_is_one_line(tmp_path: Path) -> None:
    run = [sys.executable, "examples/finetune_llama.py", "--use_cpu", "--output_dir", str(tmp_path / "out")]
    run += ["--model", "no-such-model"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("finetune_llama.py: --model no-such-model: its tokenizer could not")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
