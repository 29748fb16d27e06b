"""Finetunes LLaMA, or any causal language model, on instructions, with Distributed Lion; whole or by LoRA.

Two processes on the CPU; the model is a path or a hub id, the data a JSON or JSONL file or a hub id, in rows of
`instruction`, `input` and `output`:

    accelerate launch --config_file examples/launch/cpu_2.yaml examples/finetune_llama.py --use_cpu \\
        --model path/to/model --dataset alpaca.json --optim dmuon_mavo --learning_rate 1e-4 --weight_decay 0.01 \\
        --per_device_train_batch_size 4 --max_steps 500

With `--optim adamw_torch`, and a learning rate for it, gradients are averaged as ever: the baseline. On GPUs,
leave out `--use_cpu` and take `one_node_gpus.yaml` or `several_nodes.yaml`:

    accelerate launch --config_file examples/launch/one_node_gpus.yaml examples/finetune_llama.py \\
        --config examples/recipes/llama_7b_alpaca.yaml --model meta-llama/Llama-2-7b-hf

`--config` reads arguments from a YAML file; what stands on the command line wins over it. `--lora_r 16` trains a
LoRA adapter of that rank in place of the whole model: only the adapter is voted on, travels and is saved. With
`--dtype bfloat16` its frozen base takes half the memory.

The loss is that of the responses alone. A batch is padded to its longest row, with the tokenizer's pad token; where
there is none, as for LLaMA, with its unknown token or else the token that ends a response. Padding is masked and has
no labels, so the id does not matter to training, and neither tokenizer nor embeddings change. `eval_response_loss`
is the exact mean over all response tokens of the validation rows, whatever the batches and processes;
`eval_loss`, the Trainer's, is a mean of means of batches.

`--resume_from_checkpoint auto` continues from the newest checkpoint in the output folder if there is one; a
path continues from that one.
"""

import sys
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from common.arguments import checkpoint_to_resume, parse_arguments
from common.errors import ArgumentsError, DataError, ModelError
from common.instruction_data import InstructionData, PadToLongest, load_instruction_data
from common.instruction_prompts import PROMPTS
from common.pretrained import ALL_LINEAR, DTYPES, add_lora, load_model, load_tokenizer, pad_id
from common.response_loss import RESPONSE_LOSS, response_loss, response_sums
from common.run_results import ReportLastStep, train_and_report
from hf_dlion import DLionTrainer, DLionTrainingArguments
from hf_dlion.trainer.methods import METHODS

# Where this script differs from the Trainer: it shows progress and a validation curve without being asked.
DEFAULTS: dict[str, Any] = {
    "output_dir": "finetune_llama_output",
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 200,
    "eval_on_start": True,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "ddp_find_unused_parameters": False,
}


@dataclass
class ScriptArguments:
    """What is trained, and on what."""

    config: str | None = field(
        default=None,
        metadata={"help": "YAML file with arguments (names without dashes); the command line wins."},
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Hub id or path of a causal language model with its tokenizer. Needed."},
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "Of the parameters as they are loaded. bfloat16 is for the frozen base of LoRA, whose adapter "
            "stays in float32. Of a whole model, optimizers of transformers lose small updates to it; hf_dlion's round "
            "at random, and lose none on average. To compute in bfloat16, use --bf16.",
            "choices": list(DTYPES),
        },
    )
    dataset: str = field(
        default="tatsu-lab/alpaca",
        metadata={"help": "JSON file (a list), JSONL file or hub id; rows of instruction, input and output."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Which one, of a hub dataset with several."})
    prompt: str = field(
        default="auto",
        metadata={
            "help": "'alpaca' is Stanford Alpaca's prompt, 'chat' the tokenizer's chat template, 'auto' the latter "
            "where there is one.",
            "choices": list(PROMPTS),
        },
    )
    max_length: int = field(
        default=512,
        metadata={"help": "Tokens a row. Longer responses are cut; rows without room for a response are dropped."},
    )
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the rows kept for validation, chosen by a hash of their content."}
    )
    lora_r: int = field(default=0, metadata={"help": "Rank of the LoRA adapter; 0 trains the whole model."})
    lora_alpha: float = field(default=16.0, metadata={"help": "The adapter is scaled by this over the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout of what goes into the adapter."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={
            "help": f"Names of the modules with an adapter, such as q_proj v_proj; '{ALL_LINEAR}' is every linear "
            "layer but the output."
        },
    )
    model_card: bool = field(default=False, metadata={"help": "Write a model card, README.md, beside the model."})

    def __post_init__(self) -> None:
        if self.model is None:
            raise ArgumentsError("--model is missing: give a hub id or the path of a model, here or in --config.")
        # argparse checks the choices of the command line, and not those of a recipe.
        for name, value, choices in (("dtype", self.dtype, DTYPES), ("prompt", self.prompt, PROMPTS)):
            if value not in choices:
                raise ArgumentsError(f"--{name} {value}: it is one of {', '.join(choices)}.")
        if self.lora_r < 0:
            raise ArgumentsError(f"--lora_r {self.lora_r}: give a rank such as 16, or 0 to train the whole model.")
        if self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ArgumentsError(
                f"--lora_alpha {self.lora_alpha}, --lora_dropout {self.lora_dropout}: the first is above 0, the "
                "second in [0, 1)."
            )
        if isinstance(self.lora_target_modules, str):  # YAML: one name, without brackets
            self.lora_target_modules = [self.lora_target_modules]


class RestoreCache(TrainerCallback):
    """The Trainer turns the key-value cache off; a model that is saved to generate with has it on."""

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["model"].config.use_cache = True


def build_trainer(script_args: ScriptArguments, args: DLionTrainingArguments) -> tuple[DLionTrainer, InstructionData]:
    name = str(script_args.model)
    tokenizer = load_tokenizer(name)
    data = load_instruction_data(
        script_args.dataset,
        script_args.dataset_config,
        tokenizer,
        script_args.prompt,
        script_args.max_length,
        script_args.validation_fraction,
        lambda: args.main_process_first(desc="loading the dataset"),
    )
    set_seed(args.seed)
    model = load_model(name, script_args.dtype, script_args.max_length, data)
    padding = pad_id(tokenizer, data.prompt.end_id, model.get_input_embeddings().num_embeddings)
    if script_args.lora_r:
        shape = (script_args.lora_r, script_args.lora_alpha, script_args.lora_dropout)
        model = add_lora(model, *shape, script_args.lora_target_modules, bool(args.gradient_checkpointing))
    trainer = DLionTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=PadToLongest(padding),
        processing_class=tokenizer,
        compute_metrics=response_loss,
        preprocess_logits_for_metrics=response_sums,
        callbacks=[ReportLastStep(), RestoreCache()],
    )
    return trainer, data


def how_to_use(model: str, folder: str, end_id: int) -> str:
    return (
        f"The adapter is in {folder}. To load it, and to merge it into its base model:\n"
        "    from peft import PeftModel\n"
        "    from transformers import AutoModelForCausalLM\n"
        f"    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({model!r}), {folder!r})\n"
        '    model.merge_and_unload().save_pretrained("merged")\n'
        f"A response ends with token {end_id}: generate(..., eos_token_id={end_id}) if the base model stops at another."
    )


def main() -> None:
    script_args, args = parse_arguments([ScriptArguments, DLionTrainingArguments], __doc__, DEFAULTS)
    checkpoint = checkpoint_to_resume(args)
    trainer, data = build_trainer(script_args, args)
    if trainer.is_world_process_zero():
        print(f"Prompt: {data.prompt.name}. {data.counts.summary(script_args.max_length)}")
        if script_args.dtype == "bfloat16" and not script_args.lora_r and args.optim not in METHODS:
            print(f"--dtype bfloat16 with {args.optim}: small updates are lost. Better: float32 with --bf16.")
    about: dict[str, Any] = {
        "model": script_args.model,
        "dataset": script_args.dataset,
        "prompt": data.prompt.name,
        "max_length": script_args.max_length,
        "row_counts": asdict(data.counts),
        "dtype": script_args.dtype,
        "lora": {key: value for key, value in vars(script_args).items() if key.startswith("lora_")}
        if script_args.lora_r
        else None,
    }
    train_and_report(trainer, checkpoint, about, script_args.model_card, loss_key=f"eval_{RESPONSE_LOSS}")
    if script_args.lora_r and trainer.is_world_process_zero():
        print(how_to_use(str(script_args.model), str(args.output_dir), data.prompt.end_id))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ArgumentsError, DataError, ModelError) as error:
        sys.exit(f"finetune_llama.py: {error}")
