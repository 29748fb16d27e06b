"""The model card of a run: metadata that the hub reads, and what a reader wants to know of the training."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import Trainer

from .methods import METHODS
from .report import TEXT_GENERATION, run_report

logger = logging.getLogger(__name__)

CARD = "README.md"
CURVE = "learning_curve.png"
EVALUATION = "## Evaluation"

_PAPER = "[Liu et al., NeurIPS 2024](https://arxiv.org/abs/2404.00438)"
_REPORTED_DATASET = "validation"
_METRICS = {
    "loss": "validation_loss_last",
    "perplexity": "validation_perplexity",
    "accuracy": "validation_accuracy",
}


def write_card(trainer: Trainer, loss_key: str = "eval_loss", **about: Any) -> Path:
    """Write ``README.md`` and ``learning_curve.png`` into the output folder.

    A card that is there is replaced, but for results of other evaluations in its metadata and for its section
    "Evaluation", which are kept.

    Args:
        trainer: after ``train()``.
        loss_key: entry of its log with the validation loss, in nats: per token, or per row of a classifier.
        about: the arguments of ``Trainer.create_model_card``.

    Returns:
        The path of the card.
    """
    folder = Path(str(trainer.args.output_dir))
    report = run_report(trainer, loss_key)
    name = about.get("model_name") or folder.resolve().name
    path = folder / CARD
    kept_results, kept_section = _kept(path)
    data = ModelCardData(
        language=about.get("language"),
        license=about.get("license"),
        library_name="peft" if _is_adapter(trainer) else "transformers",
        pipeline_tag=_first(about.get("tasks")) or report["task"],
        tags=["hf_dlion", report["method"], *_listed(about.get("tags"))],
        base_model=_base_model(trainer, about.get("finetuned_from")),
        datasets=[d for d in _listed(about.get("dataset_tags")) + _listed(about.get("dataset")) if _on_the_hub(d)]
        or None,
        model_name=name,
        eval_results=(_own_results(report, about) + kept_results) or None,
    )
    if not data.eval_results:
        data.model_name = None
    unit = "nats per token" if report["task"] == TEXT_GENERATION else "nats"
    curve = _draw(trainer.state.log_history, loss_key, unit, folder / CURVE)
    body = _body(name, report, _listed(about.get("dataset")), curve)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}{kept_section}").save(path)
    return path


def _kept(path: Path) -> tuple[list[EvalResult], str]:
    if not path.exists():
        return [], ""
    card = ModelCard.load(path)
    section = re.search(rf"\n{EVALUATION}\n.*?(?=\n## |\Z)", card.text, re.DOTALL)
    kept = [result for result in card.data.eval_results or [] if result.dataset_type != _REPORTED_DATASET]
    return kept, section.group() if section else ""


def _own_results(report: dict[str, Any], about: dict[str, Any]) -> list[EvalResult]:
    if report["validation_loss_last"] is None:
        return []
    task = _first(about.get("tasks")) or report["task"]
    name = ", ".join(_listed(about.get("dataset"))) or "held out"
    figures = {metric: report[key] for metric, key in _METRICS.items()}
    return [
        EvalResult(
            task_type=task,
            dataset_type=_REPORTED_DATASET,
            dataset_name=f"{name}, validation",
            metric_type=metric,
            metric_name=f"validation {metric}",
            metric_value=round(value, 4),
        )
        for metric, value in figures.items()
        if value is not None
    ]


def _how(report: dict[str, Any]) -> str:
    """In one sentence, how it was trained."""
    method, options, votes = report["method"], report["method_options"], report["gradient_votes"]
    if every := options.get("local_steps"):
        do = "average" if options["outer_aggregation"] == "mean" else "vote on"
        return (
            f'Trained with `optim="{method}"` and `local_steps={every}` of hf_dlion: each worker steps by itself, and '
            f"every {every} steps they {do} how far they have come."
        )
    if method in METHODS:
        source = {"dlion": f", as in {_PAPER}", "dmuon": f", after {_PAPER}"}.get(method.partition("_")[0], "")
        averages = options.get("rest") == "average"
        rest = "; AdamW on averaged gradients for what is no hidden matrix" if averages else ""
        return f'Trained with `optim="{method}"` of hf_dlion ({METHODS[method].summary}{rest}){source}.'
    if votes:
        return (
            f'Trained with `optim="{method}"` of transformers on gradients that the workers voted on, one bit a '
            f'parameter each (`gradient_votes="{votes}"` of hf_dlion).'
        )
    return f'Trained with `optim="{method}"` of transformers, with averaged gradients.'


def _body(name: str, report: dict[str, Any], datasets: list[str], curve: bool) -> str:
    method = report["method"]
    settings = {
        "method": f"`{method}`",
        **{f"`{key}`": f"`{value}`" for key, value in report["method_options"].items() if key != "lr"},
        "workers": f"{report['workers']}{', in one process' if report['virtual_workers'] > 1 else ''}",
        "data": ", ".join(datasets) or "not stated",
        "steps": f"{report['steps']} of {report['rows_per_step']} rows",
        "batch of a worker": f"{report['per_device_train_batch_size']} rows, "
        f"{report['gradient_accumulation_steps']} a step",
        "learning rate": f"{report['learning_rate']:g}, {report['lr_scheduler']}",
        "warm-up": f"{report['warmup_steps']} steps",
        "weight decay": f"{report['weight_decay']:g}",
        "clipping": f"{report['max_grad_norm']:g}",
        "precision": report["precision"],
        "seed": report["seed"],
    }
    results = {
        "trainable parameters": f"{report['trainable_parameters']:,}",
        "training loss": _shown(report["train_loss"], ".4f"),
        "validation loss, first": _shown(report["validation_loss_first"], ".4f"),
        "validation loss, last": _shown(report["validation_loss_last"], ".4f"),
        **{
            f"validation {metric}": format(report[_METRICS[metric]], form)
            for metric, form in (("perplexity", ".2f"), ("accuracy", ".2%"))
            if report[_METRICS[metric]] is not None
        },
        "seconds": _shown(report["seconds"], ".0f"),
        f"bytes a worker sent, {report['bytes_counted_steps']} steps": _shown(report["bytes_sent"], ",d"),
        "bytes of an fp32 all-reduce": _shown(report["bytes_fp32_allreduce"], ",d"),
        "all-reduce over sent": _shown(report["fp32_allreduce_over_sent"], ".1f"),
    }
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    return "\n".join(
        [
            f"# {name}\n",
            f"{_how(report)}\n",
            "## Training\n",
            _table("setting", "value", settings),
            _table("result", "value", results),
            f"![Loss over steps]({CURVE})\n" if curve else "",
            f"On {report['machine']}, with {versions}; in each of {report['processes']} processes:\n",
            f"```bash\n{report['command']}\n```\n",
        ]
    )


def _table(left: str, right: str, rows: dict[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "| --- | --- |", *(f"| {key} | {value} |" for key, value in rows.items())]
    return "\n".join(lines) + "\n"


def _shown(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def _draw(history: list[dict[str, Any]], loss_key: str, unit: str, path: Path) -> bool:
    """Whether there is a picture now."""
    curves = {
        label: [(entry["step"], entry[key]) for entry in history if key in entry]
        for label, key in (("training", "loss"), ("validation", loss_key))
    }
    if not any(curves.values()):
        return False
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("The model card has no learning curve: matplotlib is missing. `pip install 'hf-dlion[plot]'`.")
        return False
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for label, points in curves.items():
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if label == "validation" else None)
    axes.set(xlabel="step", ylabel=f"loss, {unit}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def _base_model(trainer: Trainer, given: str | None) -> str | None:
    if given is None:
        model = trainer.accelerator.unwrap_model(trainer.model)
        given = getattr(getattr(model, "config", None), "_name_or_path", None)
    return given if given and _on_the_hub(given) else None


def _is_adapter(trainer: Trainer) -> bool:
    return hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config")


def _on_the_hub(name: str) -> bool:
    """Whether a name can be one of the hub's: a path in its metadata would be refused there."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name)) and not Path(name).exists()


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _first(value: str | list[str] | None) -> str | None:
    return next(iter(_listed(value)), None)
