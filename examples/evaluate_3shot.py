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
import torch
import torch.distributed as dist
from accelerate import PartialState
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedTokenizerBase

from common.arguments import ArgumentsError
from evaluation.score_table import ResultsError, average, comparison_table, read_results, run_table, update_model_card
from evaluation.tasks_3shot.definitions import NAMES, LoadedTask, TaskError, check_tasks, digest, load_task
from hf_dlion.wire.collectives import settle

ADAPTER, CARD = "adapter_config.json", "README.md"
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
DEFAULT_OUTPUT = "evaluate_3shot_output"
VERSIONS = ("lm_eval", "torch", "transformers", "datasets", "peft")
PATIENCE = timedelta(hours=6)  # ranks wait for each other's share, and for the data to be downloaded by one

# What lm-eval makes of a request: its texts, the tokens of the prompt, those of the continuation.
Request = tuple[tuple[str, str], list[int], list[int]]


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


def load_model(args: ScriptArguments, device: torch.device) -> tuple[Any, PreTrainedTokenizerBase, str | None]:
    """The model on its device, its tokenizer, and the base's name if it is an adapter."""
    assert args.model is not None
    adapter = (Path(args.model) / ADAPTER).is_file()
    base = _base_of(args.model, args.base_model) if adapter else args.model
    flag = "--base_model" if adapter else "--model"
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=args.dtype)
    except (OSError, ValueError) as error:
        raise ArgumentsError(
            f"{flag} {base}: cannot be loaded as a causal language model ({_first_line(error)}). Give a folder or a "
            f"hub id of one{', as this adapter was trained on' if adapter else ''}."
        ) from error
    tokenizer = _load_tokenizer(args.model, base)
    if adapter:
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))  # the adapter was trained with tokens added
        try:
            model = PeftModel.from_pretrained(model, args.model)
        except (OSError, ValueError, RuntimeError) as error:
            raise ArgumentsError(
                f"--model {args.model}: this adapter does not go on {base} ({_first_line(error)}). Give the model it "
                f"was trained on with --base_model."
            ) from error
    return model.to(device), tokenizer, base if adapter else None


def _base_of(adapter: str, given: str | None) -> str:
    named = given or json.loads((Path(adapter) / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not named:
        raise ArgumentsError(f"--model {adapter}: {ADAPTER} does not name its base model. Give it with --base_model.")
    return str(named)


def _load_tokenizer(model: str, base: str) -> PreTrainedTokenizerBase:
    """The model's own if it has one: an adapter's folder may hold that of its base with tokens added."""
    source = model if any((Path(model) / name).is_file() for name in TOKENIZER_FILES) else base
    local = Path(source).is_dir()
    try:
        # A folder without the files is no error to transformers: it makes an empty tokenizer from the model's config.
        if local and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
            raise OSError("no tokenizer files there")
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ArgumentsError(
            f"--model {model}: no tokenizer can be loaded from {source} ({_first_line(error)}). Save the one it was "
            f"trained with there: tokenizer.save_pretrained(...)."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class SharedModel(HFLM):
    """lm-eval's model, over several processes: each computes a share of the batches, and all have all answers.

    lm-eval spreads rows over ranks itself, and then every rank draws other shots than one process would. Here, to
    lm-eval every process is alone: it builds the same prompts. The batches are those of one process, too: with
    others, padding and hence rounding would differ.

    Args:
        model: on its device.
        tokenizer: the model's.
        rank: this process.
        workers: how many there are.
        options: of HFLM.
    """

    def __init__(self, model: Any, tokenizer: Any, rank: int, workers: int, **options: Any) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        self.process_index = rank
        self.workers = workers
        self.asked = 0
        self.truncated = 0

    def _loglikelihood_tokens(self, requests: list[Request], **options: Any) -> list[tuple[float, bool]]:
        self.asked += len(requests)
        length = self.max_length + 1  # the last token of the continuation is not fed to the model
        self.truncated += sum(len(prompt) + len(continuation) > length for _, prompt, continuation in requests)
        if self.workers == 1:
            return super()._loglikelihood_tokens(requests, **options)
        places = share(requests, int(self.batch_size), self.process_index, self.workers)
        answers = super()._loglikelihood_tokens([requests[i] for i in places], **options) if places else []
        parts: list[list[tuple[int, Any]]] = [[] for _ in range(self.workers)]
        dist.all_gather_object(parts, list(zip(places, answers, strict=True)))
        together = dict(pair for part in parts for pair in part)
        return [together[place] for place in range(len(requests))]


def share(requests: list[Request], batch_size: int, rank: int, workers: int) -> list[int]:
    """The places of this rank's requests: every `workers`-th batch, counted as HFLM makes them.

    HFLM computes continuations that differ in their last token at once, by the longest, and takes what is left from
    long to short.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (_, prompt, continuation) in enumerate(requests):
        groups.setdefault((*prompt, *continuation[:-1]), []).append(place)

    def order(group: list[int]) -> tuple[int, tuple[int, ...]]:
        _, prompt, continuation = requests[max(group, key=lambda place: len(requests[place][2]))]
        return -len(prompt) - len(continuation), (*prompt, *continuation)

    ranked = sorted(groups.values(), key=order)
    batches = [ranked[start : start + batch_size] for start in range(0, len(ranked), batch_size)]
    return sorted(place for batch in batches[rank::workers] for group in batch for place in group)


@contextlib.contextmanager
def quiet(loud: bool) -> Iterator[None]:
    """One process shows progress; lm-eval's own warnings are about what is chosen here."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with contextlib.ExitStack() as stack:
        if not loud:
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        yield


def score(args: ScriptArguments, model: SharedModel, tasks: dict[str, LoadedTask]) -> dict[str, Any]:
    """lm-eval's numbers, by task, all metrics; the one for the tables as `value` and `stderr`."""
    chosen: Any = {"tasks": {name: loaded.task for name, loaded in tasks.items()}, "groups": {}}
    outcome: Any = evaluate(lm=model, task_dict=chosen, limit=args.limit, log_samples=False)
    scores = {}
    for name, loaded in tasks.items():
        row = outcome["results"][name]
        metrics = {}
        for key in row:
            metric, _, rest = key.partition(",")
            if rest and not metric.endswith("_stderr"):
                error = row.get(f"{metric}_stderr,{rest}")
                metrics[metric] = {"value": row[key], "stderr": error if isinstance(error, float) else None}
        scores[name] = {
            "alias": loaded.title,
            "metric": loaded.metric,
            **metrics[loaded.metric],
            "n": outcome["n-samples"][name]["effective"],
            "metrics": metrics,
            "dataset": loaded.dataset,
            "config": loaded.config,
            "split": loaded.split,
        }
    return scores


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
    model, tokenizer, base = load_model(args, state.device)
    with quiet(loud=state.is_main_process):
        options = {"batch_size": args.batch_size, "max_length": args.max_length}
        shared = SharedModel(model, tokenizer, state.process_index, state.num_processes, **options)
        with state.main_process_first():
            tasks = {name: load_task(name, args.data_dir, args.num_fewshot, args.seed) for name in args.tasks}
        scores = score(args, shared, tasks)
    if not state.is_main_process:
        return
    results = report(args, scores, shared, base, time.monotonic() - start)
    assert args.model is not None
    folder = Path(args.output_dir or (args.model if Path(args.model).is_dir() else DEFAULT_OUTPUT))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{args.num_fewshot}shot.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(run_table(results))
    if shared.truncated:
        cut = f"{shared.truncated} of {shared.asked} prompts and continuations did not fit {shared.max_length} tokens"
        print(f"{cut}; their prompts were cut at the start.")
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
    settle()
    state.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ArgumentsError, TaskError, ResultsError) as error:
        sys.exit(f"evaluate_3shot.py: {error}")
