"""sentence-transformers with Distributed Lion: its Trainer and its arguments, with our mixins.

    accelerate launch --config_file examples/launch/cpu_2.yaml examples/hosts/sentence_transformers_train.py \\
        --use_cpu --model sentence-transformers/all-MiniLM-L6-v2 --optim dlion_mavo --learning_rate 1e-5

Pairs of numbers in words and figures, made here, stand for your own pairs. Run with sentence-transformers 6.2.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import HfArgumentParser

from hf_dlion import DLionArgumentsMixin, DLionTrainerMixin

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@dataclass
class Arguments(DLionArgumentsMixin, SentenceTransformerTrainingArguments):
    output_dir: str = "out/sentence_transformers"
    model: str = field(default="sentence-transformers/all-MiniLM-L6-v2", metadata={"help": "A hub id or a path."})


class DLionSentenceTransformerTrainer(DLionTrainerMixin, SentenceTransformerTrainer):
    pass


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    pairs = [{"anchor": f"{i}{j}", "positive": f"{a} {b}"} for i, a in enumerate(WORDS) for j, b in enumerate(WORDS)]
    model = SentenceTransformer(args.model, device="cpu" if args.use_cpu else None)
    loss = MultipleNegativesRankingLoss(model)
    rows = Dataset.from_list(pairs)
    trainer = DLionSentenceTransformerTrainer(model=model, args=args, train_dataset=rows, loss=loss)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
