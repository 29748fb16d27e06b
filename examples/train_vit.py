"""Trains a vision transformer, or any image classifier, from scratch, with Distributed Lion.

Two processes on the CPU, on scikit-learn's handwritten digits (nothing is downloaded; `pip install '.[vision]'`):

    accelerate launch --config_file examples/launch/cpu_2.yaml examples/train_vit.py --use_cpu \\
        --optim dlion_mavo --learning_rate 5e-4 --num_train_epochs 20

Four workers that take turns in one process, with the same images for each as if they were processes, here of unequal
classes:

    python examples/train_vit.py --use_cpu --virtual_workers 4 --dirichlet 0.5 --optim dlion_mavo \\
        --learning_rate 5e-4 --num_train_epochs 20

CIFAR-10 as in the paper, on GPUs, and a smaller model on your own images, in a folder or in zip files, with
`train/CLASS/NAME.jpg` and `test/CLASS/NAME.jpg`:

    accelerate launch --config_file examples/launch/one_node_gpus.yaml examples/train_vit.py \\
        --config examples/recipes/vit_cifar10.yaml
    python examples/train_vit.py --dataset images/ --model vit-mini --image_size 32 --optim dlion_mavo

`--config` reads arguments from a YAML file; what stands on the command line wins over it. Images are cropped at random
and mirrored (digits are not: mirrored, they are others) as usual for CIFAR up to 64 x 64 pixels, and as for ImageNet
above. Parts of the workers, order and random parts of the images are given by `--seed`, or `--data_seed`, so that a
run resumed by `--resume_from_checkpoint auto` meets what it would have met.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, set_seed

from common.arguments import checkpoint_to_resume, parse_arguments
from common.errors import ArgumentsError, DataError, ModelError
from common.image_data import EMBEDDED, load_image_data
from common.image_partition import PartitionError, WorkerBatchSampler, partition
from common.image_views import TestImages, TrainImages, collate, image_processor, image_size
from common.run_results import ReportLastStep, train_and_report
from common.vit_models import MINI, NAMES, build_model
from hf_dlion import DLionTrainer, DLionTrainingArguments

# Where this script differs from the Trainer: it shows progress and the accuracy without being asked.
DEFAULTS: dict[str, Any] = {
    "output_dir": "train_vit_output",
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 256,
    "logging_steps": 25,
    "eval_strategy": "epoch",
    "eval_on_start": True,
    "save_total_limit": 2,
    "lr_scheduler_type": "cosine",
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
        default=MINI,
        metadata={"help": f"{', '.join(NAMES)}, or a hub id or path whose config is taken; trained from scratch."},
    )
    dataset: str = field(
        default=EMBEDDED,
        metadata={
            "help": f"'{EMBEDDED}' (scikit-learn's), a folder or a zip file with train/CLASS/NAME.jpg and "
            "test/CLASS/NAME.jpg, a folder of such zip files, or a hub id such as uoft-cs/cifar10."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Height and width. Without it, those of the images up to 64, otherwise 224."}
    )
    dirichlet: float | None = field(
        default=None,
        metadata={
            "help": "Deal each class out to the workers in shares drawn from a Dirichlet distribution with this alpha: "
            "the smaller, the fewer classes a worker has. Without it, all have the same mixture."
        },
    )
    model_card: bool = field(default=False, metadata={"help": "Write a model card, README.md, beside the model."})


class WorkersTrainer(DLionTrainer):
    """Takes its batches as `TrainImages.batches` has them."""

    def get_train_dataloader(self) -> DataLoader:
        args = self.args
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.train_dataset.batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)


def build_trainer(script_args: ScriptArguments, args: DLionTrainingArguments) -> tuple[DLionTrainer, dict[str, Any]]:
    """The Trainer, and what `results.json` says of the data."""
    data = load_image_data(script_args.dataset, args.main_process_first(desc="loading images"))
    size = image_size(data) if script_args.image_size is None else script_args.image_size
    if size < 1:
        raise ArgumentsError(f"--image_size {size}: it is a number of pixels, 1 or more.")
    seed = args.seed if args.data_seed is None else args.data_seed
    workers = args.world_size * args.virtual_workers
    parts = partition(data.train.labels, workers, script_args.dirichlet, seed, args.per_device_train_batch_size)
    batches = WorkerBatchSampler(parts, args.per_device_train_batch_size, seed)
    set_seed(args.seed)
    trainer = WorkersTrainer(
        model=build_model(script_args.model, size, data.classes),
        args=args,
        train_dataset=TrainImages(data, size, seed, batches),
        eval_dataset=TestImages(data.test, size),
        data_collator=collate,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=predicted_class,
        processing_class=image_processor(size),
        callbacks=[ReportLastStep()],
    )
    about = {
        "model": script_args.model,
        "dataset": data.name,
        "classes": len(data.classes),
        "training_images": len(data.train.labels),
        "test_images": len(data.test.labels),
        "image_size": size,
        "dirichlet": script_args.dirichlet,
        "images_of_workers": [len(part) for part in parts],
    }
    return trainer, about


def predicted_class(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def main() -> None:
    script_args, args = parse_arguments([ScriptArguments, DLionTrainingArguments], __doc__, DEFAULTS)
    checkpoint = checkpoint_to_resume(args)
    trainer, about = build_trainer(script_args, args)
    train_and_report(trainer, checkpoint, about, script_args.model_card)
    trainer.accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ArgumentsError, DataError, ModelError, PartitionError) as error:
        sys.exit(f"train_vit.py: {error}")
