"""Scores a causal language model on ARC, BoolQ, PIQA, SIQA, HellaSwag and OpenBookQA, with lm-eval.

lm-eval comes with `pip install 'hf-dlion[eval]'`. On the hub's data, with three examples before every question, and
then with none:

    python examples/evaluate_3shot.py --model out --batch_size 16
    python examples/evaluate_3shot.py --model out --batch_size 16 --num_fewshot 0

`--model` is a hub id, a folder as `save_pretrained` writes it, or the folder of a PEFT adapter. The table is printed,
and everything is written to `3shot.json` (`0shot.json`) in the model's folder, or in `--output_dir`. Several runs in
one table, the best bold and the second underlined:

    python examples/evaluate_3shot.py --compare out_adamw out_mavo out_avg

Several GPUs, each with the whole model and a share of the questions; the result is that of one. With `cpu_2.yaml` and
`--use_cpu`, two processes on the CPU:

    accelerate launch --config_file examples/launch/one_node_gpus.yaml examples/evaluate_3shot.py --model out

Without a network: `--data_dir folder`, with a folder a task (arc_easy, arc_challenge, boolq, piqa, social_i_qa,
hellaswag, openbookqa), `train.jsonl` and `validation.jsonl` in each, in the fields of the hub's datasets. Prompts,
shots and metrics are those of lm-eval's own definitions either way; `examples/evaluation/tasks_3shot` says them task by
task.
"""

import contextlib
import json
import logging
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import datasets
from accelerate import PartialState
from transformers import HfArgumentParser

from common.errors import ArgumentsError
from evaluation.models import ADAPTER, load_model
from evaluation.score_table import ResultsError, average, comparison_table, read_results, run_table, update_model_card
from evaluation.scoring import score
from evaluation.shared_model import SharedModel
from evaluation.tasks_3shot.definitions import NAMES, TaskError, check_tasks, digest, load_task
from hf_dlion.wire.collectives import drain_gloo

CARD = "README.md"
DEFAULT_OUTPUT = "evaluate_3shot_output"
VERSIONS = ("lm_eval", "torch", "transformers", "datasets", "peft")
PATIENCE = timedelta(hours=6)  # ranks wait for each other's share, and for the data to be downloaded by one


@dataclass
class ScriptArguments:
    """What is scored, on what, and where the scores go."""

    model: str | None = field(
        default=None, metadata={"help": "Hub id, folder of a model, or folder of a PEFT adapter. Not with --compare."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Under an adapter, instead of the one that its adapter_config.json names."}
    )
    tasks: list[str] = field(
        default_factory=lambda: list(NAMES), metadata={"help": "Which of the seven, in the order of the table."}
    )
    num_fewshot: int = field(
        default=3, metadata={"help": "Examples with their answers before every question. With --compare: which runs."}
    )
    limit: int | None = field(
        default=None, metadata={"help": "Score the first so many rows of every task, to try things out."}
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with local files, a folder a task. Without it, the hub's datasets are downloaded."},
    )
    batch_size: int = field(default=8, metadata={"help": "Continuations in a forward pass, of each process."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "Of the weights; auto: as the model was saved."}
    )
    max_length: int | None = field(
        default=None,
        metadata={"help": "Tokens the model sees; longer prompts lose their start. Without it, the model's own."},
    )
    seed: int = field(default=1234, metadata={"help": "Of the choice of examples. lm-eval's own default."})
    use_cpu: bool = field(default=False, metadata={"help": "Even if there are GPUs."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": f"Without it, the model's folder, or {DEFAULT_OUTPUT} for a model of the hub."},
    )
    model_card: bool = field(
        default=False, metadata={"help": f"Put the scores into the {CARD} of the model's folder as well."}
    )
    compare: list[str] | None = field(
        default=None, metadata={"help": "Folders with results, for one table over all. Evaluates nothing."}
    )


def check_arguments(args: ScriptArguments) -> None:
    if args.num_fewshot < 0:
        raise ArgumentsError(f"--num_fewshot {args.num_fewshot}: there are no fewer than none. Give 0 or more.")
    if args.compare is not None:
        if args.model is not None:
            raise ArgumentsError("--model and --compare together: evaluate first, then compare without --model.")
        return
    if args.model is None:
        raise ArgumentsError("neither --model nor --compare: name a model to score, or folders to compare.")
    for name, least in (("limit", 1), ("batch_size", 1), ("max_length", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ArgumentsError(f"--{name} {value}: give {least} or more.")
    check_tasks(args.tasks, args.data_dir)
    _check_folder("--model", args.model)
    if args.base_model is not None:
        if not (Path(args.model) / ADAPTER).is_file():
            raise ArgumentsError(f"--base_model {args.base_model}: --model {args.model} is no adapter (no {ADAPTER}).")
        _check_folder("--base_model", args.base_model)
    if args.model_card and not (Path(args.model) / CARD).is_file():
        raise ArgumentsError(f"--model_card: no {CARD} in {args.model}. Write one first, or leave --model_card away.")


def _check_folder(flag: str, name: str) -> None:
    path = Path(name)
    if path.is_dir():
        if not any((path / known).is_file() for known in ("config.json", ADAPTER)):
            raise ArgumentsError(f"{flag} {name}: no model there, neither config.json nor {ADAPTER}. Give its folder.")
    elif path.exists() or name.startswith((".", "~", os.sep)) or name.count("/") > 1:
        raise ArgumentsError(f"{flag} {name}: no such folder. Give that of a model or adapter, or a hub id.")


@contextlib.contextmanager
def quiet(loud: bool) -> Iterator[None]:
    """One process shows progress; lm-eval's own warnings are about what is chosen here."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with contextlib.ExitStack() as stack:
        if not loud:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield


def report(
    args: ScriptArguments, scores: dict[str, Any], model: SharedModel, base: str | None, seconds: float
) -> dict[str, Any]:
    local = {"source": "local files", "folder": args.data_dir}
    return {
        "model": args.model,
        "base_model": base,
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "seed": args.seed,
        "data": {"source": "hub"} if args.data_dir is None else local | {"digest": digest(args.tasks, args.data_dir)},
        "tasks": scores,
        "average": average(scores),
        "max_length": model.max_length,
        "requests": model.asked,
        "truncated_requests": model.truncated,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "batch_size": args.batch_size,
        "workers": model.workers,
        "seconds": seconds,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in VERSIONS},
        "command": shlex.join(sys.argv),
    }


def run(args: ScriptArguments, state: PartialState) -> None:
    """Evaluates in every process; the first one prints and writes."""
    start = time.monotonic()
    assert args.model is not None
    model, tokenizer, base = load_model(args.model, args.base_model, args.dtype, state.device)
    with quiet(loud=state.is_main_process):
        options = {"batch_size": args.batch_size, "max_length": args.max_length}
        shared = SharedModel(model, tokenizer, state.process_index, state.num_processes, **options)
        with state.main_process_first():
            tasks = {name: load_task(name, args.data_dir, args.num_fewshot, args.seed) for name in args.tasks}
        scores = score(shared, tasks, args.limit)
    if not state.is_main_process:
        return
    results = report(args, scores, shared, base, time.monotonic() - start)
    folder = Path(args.output_dir or (args.model if Path(args.model).is_dir() else DEFAULT_OUTPUT))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.num_fewshot}shot.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(run_table(results))
    if args.model_card:
        update_model_card(Path(args.model) / CARD, results)


def compare(args: ScriptArguments) -> None:
    assert args.compare is not None
    table = comparison_table(read_results(args.compare, args.num_fewshot))
    print(table)
    if args.output_dir is not None:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        (Path(args.output_dir) / f"{args.num_fewshot}shot.md").write_text(table + "\n", encoding="utf-8")


def main() -> None:
    parser = HfArgumentParser(ScriptArguments, description=(__doc__ or "").partition("\n")[0])
    (args,) = parser.parse_args_into_dataclasses(look_for_args_file=False)
    check_arguments(args)
    if args.compare is not None:
        compare(args)
        return
    state = PartialState(cpu=args.use_cpu, timeout=PATIENCE)
    run(args, state)
    state.wait_for_everyone()
    drain_gloo()
    state.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ArgumentsError, TaskError, ResultsError) as error:
        sys.exit(f"evaluate_3shot.py: {error}")
