"""Pretrains GPT-2, its LLaMA-style variant, or any causal language model from scratch, with Distributed Lion.

Two processes on the CPU, on the source of Python's own standard library (nothing is downloaded):

    accelerate launch --config_file examples/launch/cpu_2.yaml examples/pretrain_gpt2.py --use_cpu \\
        --optim dmuon_mavo --learning_rate 2e-2 --weight_decay 0.1 \\
        --per_device_train_batch_size 4 --max_steps 1200

With `--optim adamw_torch`, and a learning rate for it, gradients are averaged as ever: the baseline. On GPUs,
leave out `--use_cpu` and take `one_node_gpus.yaml` or `several_nodes.yaml`:

    accelerate launch --config_file examples/launch/one_node_gpus.yaml examples/pretrain_gpt2.py \\
        --config examples/recipes/gpt2_350m_openwebtext.yaml

`--config` reads arguments from a YAML file; what stands on the command line wins over it. Your own text:
`--dataset file.txt`, `--dataset file.jsonl --text_column body`, `--dataset folder/`, or a hub id, with
`--streaming` to read it while training instead of tokenising it first.

`--resume_from_checkpoint auto` continues from the newest checkpoint in the output folder if there is one; a
path continues from that one. The data order is the Trainer's: given by `--seed` and `--data_seed`, and
skipped forward on resuming. A streamed dataset is skipped forward by reading it again from its start.
"""

import sys
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import default_data_collator, set_seed

from common.arguments import checkpoint_to_resume, parse_arguments
from common.cache import DEFAULT_CACHE
from common.errors import ArgumentsError, DataError, ModelError
from common.gpt2_models import NAMES, TINY, build_model
from common.run_results import ReportLastStep, train_and_report
from common.text_corpora import EMBEDDED
from common.text_data import TextData, TextOptions, load_text_data
from common.text_stream import stream_text_data
from hf_dlion import DLionTrainer, DLionTrainingArguments

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
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "eager, sdpa, flash_attention_2, as in transformers. Without it: the model's choice."},
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
    model_card: bool = field(default=False, metadata={"help": "Write a model card, README.md, beside the model."})


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


def main() -> None:
    script_args, args = parse_arguments([ScriptArguments, DLionTrainingArguments], __doc__, DEFAULTS)
    checkpoint = checkpoint_to_resume(args)
    data = load_data(script_args, args)
    set_seed(args.seed)
    model = build_model(script_args.model, data.tokenizer, script_args.block_size, script_args.attn_implementation)
    trainer = DLionTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=default_data_collator,  # blocks are full: nothing to pad
        processing_class=data.tokenizer,
        callbacks=[ReportLastStep()],
    )
    about = {"model": script_args.model, "dataset": data.name, "dataset_key": data.key}
    about |= {"tokens_per_step": trainer.get_total_train_batch_size(args) * script_args.block_size}
    train_and_report(trainer, checkpoint, about, script_args.model_card)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ArgumentsError, DataError, ModelError) as error:
        sys.exit(f"pretrain_gpt2.py: {error}")
