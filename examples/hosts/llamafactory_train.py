"""`llamafactory-cli train`, with the optimizers of hf_dlion by name. Arguments and YAML files are LLaMA-Factory's.

    accelerate launch --config_file examples/launch/one_node_gpus.yaml examples/hosts/llamafactory_train.py sft.yaml

with `optim: dlion_mavo`, and the options of its method, in the YAML. LLaMA-Factory has no plugins: this script puts our
arguments and Trainers in the place of its own before it starts. Run with LLaMA-Factory 0.9.5, stage sft.
"""

from dataclasses import dataclass

import llamafactory.hparams.parser as parser
import llamafactory.hparams.training_args as training_args
import llamafactory.train.pt.workflow as pretraining
import llamafactory.train.sft.workflow as finetuning
from llamafactory.train.tuner import run_exp

from hf_dlion import DLionArgumentsMixin, DLionTrainerMixin


@dataclass
class TrainingArguments(DLionArgumentsMixin, training_args.TrainingArguments):
    pass


class SFTTrainer(DLionTrainerMixin, finetuning.CustomSeq2SeqTrainer):
    pass


class PretrainingTrainer(DLionTrainerMixin, pretraining.CustomTrainer):
    pass


def main() -> None:
    parser._TRAIN_ARGS = [
        TrainingArguments if one is training_args.TrainingArguments else one for one in parser._TRAIN_ARGS
    ]
    finetuning.CustomSeq2SeqTrainer = SFTTrainer
    pretraining.CustomTrainer = PretrainingTrainer
    run_exp()


if __name__ == "__main__":
    main()
