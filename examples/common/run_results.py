"""What a training script reports: `results.json`, and a short table at its end."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from hf_dlion import DLionTrainer
from hf_dlion.trainer.report import run_report


class ReportLastStep(TrainerCallback):
    """Logs and validates at the last step whatever the intervals are: the table is about the whole run."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True
            # Under "epoch" the Trainer validates at the end of the last epoch by itself.
            control.should_evaluate = args.eval_strategy != IntervalStrategy.EPOCH


def train_and_report(
    trainer: DLionTrainer,
    checkpoint: str | None,
    about: dict[str, Any],
    model_card: bool = False,
    loss_key: str = "eval_loss",
) -> dict[str, Any]:
    """Trains, saves the model, and on rank 0 writes `results.json` into the output folder and prints the table.

    Args:
        trainer: with `ReportLastStep` among its callbacks.
        checkpoint: where to go on, or None.
        about: what the script knows of the run: at least `model` and `dataset`.
        model_card: whether to write the card of the model as well.
        loss_key: entry of the log with the validation loss, in nats per token or image.

    Returns:
        What `results.json` has.
    """
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    results = about | run_report(trainer, loss_key) | {"loss_key": loss_key, "log_history": trainer.state.log_history}
    if trainer.is_world_process_zero():
        path = Path(str(trainer.args.output_dir)) / "results.json"
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(table(results))
        if model_card:
            name = f"{Path(about['model']).name}-{results['method']}"
            trainer.create_model_card(model_name=name, dataset=about["dataset"], loss_key=loss_key)
    return results


def table(results: dict[str, Any]) -> str:
    def shown(key: str, form: str, otherwise: str | None) -> str | None:
        return otherwise if results[key] is None else form.format(results[key])

    steps = results["bytes_counted_steps"]
    rows: dict[str, str | None] = {
        "method": results["method"],
        "workers": str(results["workers"]),
        "model": f"{results['model']}, {results['trainable_parameters']:,} trainable parameters",
        "data": results["dataset"],
        "steps": f"{results['steps']}, of {results['rows_per_step']} rows",
        "train loss": shown("train_loss", "{:.3f}", "not logged"),
        "validation loss, first": shown("validation_loss_first", "{:.3f}", ""),
        "validation loss, last": shown("validation_loss_last", "{:.3f}", ""),
        "validation perplexity": shown("validation_perplexity", "{:.1f}", None),
        "validation accuracy": shown("validation_accuracy", "{:.1%}", None),
        "seconds": shown("seconds", "{:.0f}", ""),
        f"bytes a worker sent, {steps} steps": shown("bytes_sent", "{:,.0f}", "not counted"),
        "bytes of an fp32 all-reduce": shown("bytes_fp32_allreduce", "{:,.0f}", ""),
        "all-reduce over sent": shown("fp32_allreduce_over_sent", "{:.1f}", "-"),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items() if value is not None)
