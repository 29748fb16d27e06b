"""Pretrains GPT-2, its LLaMA-style variant, or any causal language model from scratch, with Distributed Lion.

Two processes on the CPU, on the source of Python's own standard library (nothing is downloaded):

    accelerate launch --config_file examples/configs/cpu_2.yaml examples/pretrain_gpt2.py --use_cpu \\
        --optim dlion_mavo --learning_rate 7e-4 --weight_decay 0.1 \\
        --per_device_train_batch_size 4 --max_steps 1200

With `--optim adamw_torch`, and a learning rate for it, gradients are averaged as ever: the baseline. On GPUs,
leave `--use_cpu` away and take `one_node_gpus.yaml` or `several_nodes.yaml`:

    accelerate launch --config_file examples/configs/one_node_gpus.yaml examples/pretrain_gpt2.py \\
        --config examples/configs/recipes/gpt2_350m_openwebtext.yaml

`--config` reads arguments from a YAML file; what stands on the command line wins over it. Your own text:
`--dataset file.txt`, `--dataset file.jsonl --text_column body`, `--dataset folder/`, or a hub id, with
`--streaming` to read it while training instead of tokenising it first.

`--resume_from_checkpoint auto` continues from the newest checkpoint in the output folder if there is one; a
path continues from that one. The data order is the Trainer's: given by `--seed` and `--data_seed`, and
skipped forward on resuming. A streamed dataset is skipped forward by reading it again from its start.
"""

import argparse
import json
import math
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from gpt2_models import NAMES, TINY, ModelError, build_model
from text_corpora import EMBEDDED, DataError
from text_data import DEFAULT_CACHE, TextData, TextOptions, load_text_data, stream_text_data
from transformers import (
    HfArgumentParser,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from hf_dlion import DLionTrainer, DLionTrainingArguments
from hf_dlion.wire.ledger import fp32_all_reduce_bytes

# Where this script differs from the Trainer: it shows progress and a validation curve without being asked.
DEFAULTS: dict[str, Any] = {
    "output_dir": "pretrain_gpt2_output",
    "logging_steps": 25,
    "eval_strategy": "steps",
    "eval_steps": 200,
    "eval_on_start": True,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "ddp_find_unused_parameters": False,
}
TRAINER_STATE = "trainer_state.json"
MAX_EXPONENT = 700.0  # of what a float can hold: the perplexity of a run that blew up


@dataclass
class ScriptArguments:
    """What is trained, and on what."""

    config: str | None = field(
        default=None,
        metadata={"help": "YAML file with arguments (names without dashes); the command line wins."},
    )
    model: str = field(
        default=TINY,
        metadata={"help": f"{', '.join(NAMES)}, or a hub id or path whose config is taken; trained from scratch."},
    )
    dataset: str = field(
        default=EMBEDDED,
        metadata={
            "help": f"'{EMBEDDED}' (the source of Python's standard library), a text file, a JSONL file, a "
            "folder of such files, or a hub id such as Skylion007/openwebtext."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Which one, of a hub dataset with several: wikitext-103-raw-v1, say."}
    )
    text_column: str = field(default="text", metadata={"help": "Field of the JSONL or hub dataset with the text."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read a hub dataset or JSONL while training, without a cache. Needs --max_steps."},
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Path or hub id. Without it, hub datasets and streams take gpt2's, and everything else a "
            "byte-level BPE trained on its own training split."
        },
    )
    vocab_size: int = field(default=2048, metadata={"help": "Entries of that BPE."})
    block_size: int = field(default=128, metadata={"help": "Tokens a sample: documents are packed into such blocks."})
    validation_fraction: float = field(
        default=0.05, metadata={"help": "Share of the text kept for validation, where it is split here."}
    )
    max_eval_blocks: int = field(
        default=256, metadata={"help": "Validate on at most that many blocks, spread over the split; 0: all."}
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": f"Where tokenizers and token ids are kept. Without it: {DEFAULT_CACHE} (follows HF_HOME)."},
    )


class ArgumentsError(ValueError):
    """The arguments do not go together; the message says what was given, why not, and what to do instead."""


def parse_arguments() -> tuple[ScriptArguments, DLionTrainingArguments]:
    summary = (__doc__ or "").partition("\n")[0]
    parser = HfArgumentParser([ScriptArguments, DLionTrainingArguments], description=summary)
    parser.set_defaults(**DEFAULTS)
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    recipe_parser.add_argument("--config")
    recipe = recipe_parser.parse_known_args()[0].config
    if recipe is not None:
        known = vars(parser.parse_known_args([])[0])
        parser.set_defaults(**read_recipe(recipe, set(known)))
    script_args, training_args = parser.parse_args_into_dataclasses(look_for_args_file=False)
    return script_args, training_args


def read_recipe(path: str, known: set[str]) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ArgumentsError(f"--config {path}: cannot be read as YAML ({error}).") from error
    if not isinstance(recipe, dict):
        found = type(recipe).__name__
        raise ArgumentsError(f"--config {path}: expected lines of 'name: value', found a {found}.")
    if unknown := set(recipe) - known:
        names = ", ".join(sorted(map(str, unknown)))
        raise ArgumentsError(f"--config {path}: no such argument: {names}. See --help for those there are.")
    return recipe


def checkpoint_to_resume(args: DLionTrainingArguments) -> str | None:
    wanted: str | None = args.resume_from_checkpoint
    if wanted is None:
        return None
    folder = str(args.output_dir)
    if wanted == "auto":
        newest: str | None = get_last_checkpoint(folder) if Path(folder).is_dir() else None
        return newest
    if not (Path(wanted) / TRAINER_STATE).is_file():
        raise ArgumentsError(
            f"--resume_from_checkpoint {wanted}: no checkpoint there (no {TRAINER_STATE}). Give the path "
            f"of a checkpoint-... folder, or 'auto' for the newest one in {folder}."
        )
    return wanted


def load_data(script_args: ScriptArguments, args: DLionTrainingArguments) -> TextData:
    options = TextOptions(**{f.name: getattr(script_args, f.name) for f in fields(TextOptions)})
    if not script_args.streaming:
        show_progress = not args.disable_tqdm and args.local_process_index == 0
        return load_text_data(options, lambda: args.main_process_first(desc="tokenising"), show_progress)
    if args.max_steps <= 0:
        raise ArgumentsError("--streaming without --max_steps: a stream has no length, say how many steps.")
    # Every rank reads shards of its own, instead of rank 0 reading for all and sending the batches on.
    args.accelerator_config.dispatch_batches = False
    return stream_text_data(options, args.seed if args.data_seed is None else args.data_seed)


class ReportLastStep(TrainerCallback):
    """Logs and validates at the last step whatever the intervals are: the table is about the whole run."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            control.should_evaluate = True


def summarise(
    script_args: ScriptArguments, trainer: DLionTrainer, data: TextData, seconds: float, first_step: int
) -> dict[str, Any]:
    """The figures of the run, as they go into `results.json`.

    Seconds and bytes are counted from `first_step` on, where this run began or went on; losses are of the
    whole history. Bytes are those that rank 0 sent.
    """
    args, state = trainer.args, trainer.state
    history = state.log_history
    validation = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    training = [entry["loss"] for entry in history if "loss" in entry]
    counted = [entry for entry in history if "bytes_sent_total" in entry and entry["step"] > first_step]
    sent = counted[-1]["bytes_sent_total"] if counted else None
    counted_steps = (counted[-1]["step"] if counted else state.global_step) - first_step
    parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    allreduce = fp32_all_reduce_bytes(parameters, args.world_size) * counted_steps
    return {
        "method": str(getattr(args.optim, "value", args.optim)),
        "workers": args.world_size,
        "model": script_args.model,
        "trainable_parameters": parameters,
        "dataset": data.name,
        "dataset_key": data.key,
        "steps": state.global_step,
        "tokens_per_step": trainer.get_total_train_batch_size(args) * script_args.block_size,
        "train_loss": training[-1] if training else None,
        "validation_loss_first": validation[0],
        "validation_loss_last": validation[-1],
        "validation_perplexity": math.exp(min(validation[-1], MAX_EXPONENT)),
        "seconds": seconds,
        "bytes_counted_steps": counted_steps,
        "bytes_sent": sent,
        "bytes_fp32_allreduce": allreduce,
        "fp32_allreduce_over_sent": allreduce / sent if sent else None,
        "learning_rate": args.learning_rate,
        "weight_decay": args.weight_decay,
        "seed": args.seed,
        "command": shlex.join(sys.argv),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {args.device.type}",
        "log_history": history,
    }


def table(results: dict[str, Any]) -> str:
    def shown(key: str, form: str, otherwise: str) -> str:
        return otherwise if results[key] is None else form.format(results[key])

    steps = results["bytes_counted_steps"]
    rows = {
        "method": results["method"],
        "workers": str(results["workers"]),
        "model": f"{results['model']}, {results['trainable_parameters'] / 1e6:.1f} M parameters",
        "data": results["dataset"],
        "steps": f"{results['steps']}, of {results['tokens_per_step']} tokens",
        "train loss": shown("train_loss", "{:.3f}", "not logged"),
        "validation loss, first": shown("validation_loss_first", "{:.3f}", ""),
        "validation loss, last": shown("validation_loss_last", "{:.3f}", ""),
        "validation perplexity": shown("validation_perplexity", "{:.1f}", ""),
        "seconds": shown("seconds", "{:.0f}", ""),
        f"bytes a worker sent, {steps} steps": shown("bytes_sent", "{:,.0f}", "not counted"),
        "bytes of an fp32 all-reduce": shown("bytes_fp32_allreduce", "{:,.0f}", ""),
        "all-reduce over sent": shown("fp32_allreduce_over_sent", "{:.1f}", "-"),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def main() -> None:
    script_args, args = parse_arguments()
    checkpoint = checkpoint_to_resume(args)
    data = load_data(script_args, args)
    set_seed(args.seed)
    model = build_model(script_args.model, data.tokenizer, script_args.block_size)
    trainer = DLionTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=default_data_collator,  # blocks are full: nothing to pad
        processing_class=data.tokenizer,
        callbacks=[ReportLastStep()],
    )
    first_step = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE)).global_step if checkpoint else 0
    outcome = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    if trainer.is_world_process_zero():
        results = summarise(script_args, trainer, data, outcome.metrics["train_runtime"], first_step)
        path = Path(str(args.output_dir)) / "results.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(table(results))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ArgumentsError, DataError, ModelError) as error:
        sys.exit(f"pretrain_gpt2.py: {error}")
