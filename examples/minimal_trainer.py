"""A Trainer script with Distributed Lion: two names are not those of every such script.

    accelerate launch --config_file examples/launch/cpu_2.yaml examples/minimal_trainer.py \\
        --use_cpu --optim dmuon_mavo --learning_rate 2e-2 --max_steps 60

A small GPT-2 learns to count. Two processes on the CPU take seconds, and download nothing.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, set_seed

from hf_dlion import DLionTrainer, DLionTrainingArguments

VOCABULARY, LENGTH = 64, 32


def rows(starts: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Sequences that count up by one, each from its start."""
    return [{"input_ids": row, "labels": row} for row in (starts[:, None] + torch.arange(LENGTH)) % VOCABULARY]


def main() -> None:
    parser = HfArgumentParser(DLionTrainingArguments)
    parser.set_defaults(output_dir="out/minimal_trainer", logging_steps=20, save_strategy="no", report_to="none")
    parser.set_defaults(ddp_find_unused_parameters=False)
    (args,) = parser.parse_args_into_dataclasses()
    set_seed(args.seed)
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, loss_type="ForCausalLM"))
    train, valid = torch.randint(VOCABULARY, (4096,)), torch.arange(VOCABULARY)
    trainer = DLionTrainer(model=model, args=args, train_dataset=rows(train), eval_dataset=rows(valid))
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"validation loss {loss:.3f}")


if __name__ == "__main__":
    main()
