"""The evaluation example against lm-eval itself, over processes, with adapters, and its errors."""

from __future__ import annotations

import json
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

pytest.importorskip("lm_eval", reason="lm_eval is not installed")

import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

import evaluate_3shot as script
from evaluation.models import load_model
from evaluation.scoring import score
from evaluation.shared_model import SharedModel, share
from evaluation.tasks_3shot.definitions import NAMES, TaskError, digest, load_task, local_files

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "examples" / "evaluate_3shot.py")
SHARED = ROOT.parent / "shared" / "data"

WORDS = [*(ROOT / "LICENSE").read_text().split()[20:60], "[step]", "Big"]
ROWS = {"train": 9, "validation": 7}
BATCH = 8


@pytest.fixture(autouse=True)
def _clean_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # of processes started here
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # runs pip, and takes seconds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of the launcher; and several wait for each other on a busy machine
    yield
    torch.set_num_threads(threads)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not PartialState._shared_state


def _text(rng: random.Random, least: int = 2) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(least, least + 6)))


def _row(task: str, rng: random.Random) -> dict[str, Any]:
    """One row in the hub's fields."""
    choices = rng.randint(3, 5)
    labels = rng.choice(["ABCDE", "12345"])[:choices]
    lettered = {
        "id": _text(rng),
        "choices": {"text": [_text(rng) for _ in labels], "label": list(labels)},
        "answerKey": rng.choice(labels),
    }
    forms: dict[str, dict[str, Any]] = {
        "arc": lettered | {"question": _text(rng)},
        "openbookqa": lettered | {"question_stem": _text(rng), "answerKey": " " + lettered["answerKey"]},
        "boolq": {"question": _text(rng), "passage": _text(rng, 9), "label": rng.randint(0, 1)},
        "piqa": {"goal": _text(rng), "sol1": _text(rng), "sol2": _text(rng), "label": rng.randint(0, 1)},
        "social_iqa": {name: _text(rng) for name in ("context", "question", "answerA", "answerB", "answerC")}
        | {"label": rng.choice("123")},
        "hellaswag": {name: _text(rng) for name in ("activity_label", "ctx_a", "ctx_b")}
        | {"ind": rng.randint(0, 99), "endings": [_text(rng) for _ in range(4)], "label": rng.choice("0123")},
    }
    return forms["arc" if task.startswith("arc") else task]


def _prepared(row: dict[str, Any]) -> dict[str, Any]:
    """HellaSwag with its text cleaned already, as some copies have the training split."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    query = preprocess(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    choices = [preprocess(ending) for ending in row["endings"]]
    return {"ind": row["ind"], "query": query, "choices": choices, "gold": int(row["label"])}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`local`: what the script reads; `hub`: the same rows, in the hub's fields throughout."""
    base, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for task in NAMES:
        folder = "social_i_qa" if task == "social_iqa" else task
        for split, count in ROWS.items():
            rows = [_row(task, rng) for _ in range(count)]
            _write(base / "hub" / task / f"{split}.jsonl", rows)
            prepared = task == "hellaswag" and split == "train"
            _write(base / "local" / folder / f"{split}.jsonl", [_prepared(row) for row in rows] if prepared else rows)
    return base


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama`, `gpt2` (too short for some prompts) and `adapter`, on `llama`; random weights."""
    base = tmp_path_factory.mktemp("models")
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([" ".join(WORDS)] * 9, vocab_size=300, special_tokens=["<s>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, bos_token="<s>", eos_token="<s>")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0}
    llama = LlamaConfig(
        **shape, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.5,
    )  # fmt: skip
    gpt2 = GPT2Config(**shape, n_embd=32, n_layer=2, n_head=2, n_positions=96, initializer_range=0.5)
    for name, model in (("llama", LlamaForCausalLM(llama)), ("gpt2", GPT2LMHeadModel(gpt2))):
        model.save_pretrained(base / name)
        tokenizer.save_pretrained(base / name)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["q_proj", "v_proj"])
    start = LlamaForCausalLM.from_pretrained(base / "llama")
    peft.get_peft_model(start, lora).save_pretrained(base / "adapter")
    return base


@pytest.fixture(scope="module")
def installed() -> dict[str, Path]:
    """Where lm-eval itself finds its definitions, among the folders that have them."""
    top = Path(lm_eval.tasks.__file__).parent
    folders = [str(top / name) for name in ("arc", "super_glue", "piqa", "siqa", "hellaswag", "openbookqa")]
    index = TaskManager(include_defaults=False, include_path=folders).task_index
    return {name: index[name].yaml_path for name in NAMES}


def lm_eval_alone(
    installed: dict[str, Path], files: dict[str, dict[str, str]], shots: int, limit: int | None = None, **model: Any
) -> dict[str, Any]:
    """lm-eval's own entry point on its own definitions, their dataset replaced."""
    tasks = []
    for name in NAMES:
        source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files[name]}}
        tasks.append(load_yaml(installed[name]) | source)
    results: Any = simple_evaluate(
        model="hf", model_args=model, tasks=tasks, num_fewshot=shots, batch_size=BATCH, device="cpu", limit=limit,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    return results


def splits(folder: Path) -> dict[str, str]:
    return {split: str(folder / f"{file}.jsonl") for split, file in (
        ("train", "train"), ("validation", "validation"), ("test", "validation"))}  # fmt: skip


def ours(data_dir: Path, shots: int, limit: int | None = None, **model: Any) -> tuple[dict[str, Any], Any]:
    args = script.ScriptArguments(data_dir=str(data_dir), num_fewshot=shots, batch_size=BATCH, limit=limit, **model)
    loaded, tokenizer, _ = load_model(str(args.model), args.base_model, args.dtype, torch.device("cpu"))
    shared = SharedModel(loaded, tokenizer, 0, 1, batch_size=BATCH)
    tasks = {name: load_task(name, str(data_dir), shots, args.seed) for name in NAMES}
    scores = score(shared, tasks, args.limit)
    assert script.report(args, scores, shared, None, 1.0)["requests"] == shared.asked > 0
    return scores, tasks


def assert_equal(scores: dict[str, Any], tasks: Any, theirs: dict[str, Any]) -> None:
    """Prompts, log-likelihoods and scores, without a tolerance."""
    for name in NAMES:
        samples = {sample["doc_id"]: sample for sample in theirs["samples"][name]}
        for instance in tasks[name].task.instances:
            asked = samples[instance.doc_id]["arguments"][instance.idx]
            assert tuple(asked) == instance.args
            assert tuple(samples[instance.doc_id]["resps"][instance.idx][0]) == tuple(instance.resps[0])
        row = theirs["results"][name]
        for metric, found in scores[name]["metrics"].items():
            assert found["value"] == row[f"{metric},none"]
            assert found["stderr"] == row[f"{metric}_stderr,none"]
        assert scores[name]["n"] == theirs["n-samples"][name]["effective"]
        assert scores[name]["value"] == row[f"{scores[name]['metric']},none"]


@pytest.mark.parametrize("shots", [0, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_those_of_lm_eval(
    family: str, shots: int, data: Path, models: Path, installed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", data / "cache")
    files = {name: splits(data / "hub" / name) for name in NAMES}
    theirs = lm_eval_alone(installed, files, shots, pretrained=str(models / family))
    scores, tasks = ours(data / "local", shots, model=str(models / family))
    assert_equal(scores, tasks, theirs)


def test_adapters_by_path(
    data: Path, models: Path, installed: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", data / "cache")
    adapter, base = str(models / "adapter"), str(models / "llama")
    files = {name: splits(data / "hub" / name) for name in NAMES}
    theirs = lm_eval_alone(installed, files, 3, limit=2, pretrained=base, peft=adapter)
    scores, tasks = ours(data / "local", 3, limit=2, model=adapter)
    assert_equal(scores, tasks, theirs)
    _, given = ours(data / "local", 3, limit=2, model=adapter, base_model=base)
    _, plain = ours(data / "local", 3, limit=2, model=base)
    answers = [
        [instance.resps for name in NAMES for instance in kind[name].task.instances] for kind in (tasks, given, plain)
    ]
    assert answers[0] == answers[1] != answers[2]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the benchmarks' own files are not here")
def test_scores_are_those_of_lm_eval_on_the_benchmarks(
    installed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    local = SHARED / "benchmarks"
    folders = {name: local_files(name, str(local))[0].parent for name in NAMES}
    files = {name: splits(folder) for name, folder in folders.items()}
    for split, path in splits(folders["hellaswag"]).items():
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        fields = ("activity_label", "ctx_a", "ctx_b", "endings", "label")
        _write(tmp_path / f"{split}.jsonl", [{name: _original(row)[name] for name in fields} for row in rows])
    files["hellaswag"] = splits(tmp_path)
    model = str(SHARED / "stories260k")
    theirs = lm_eval_alone(installed, files, 3, limit=2, pretrained=model)
    scores, tasks = ours(local, 3, limit=2, model=model)
    assert_equal(scores, tasks, theirs)


def _original(row: dict[str, Any]) -> dict[str, Any]:
    """A row of HellaSwag's fields of which lm-eval's clean-up makes the given, cleaned one."""
    from lm_eval.tasks.hellaswag.utils import preprocess

    if "query" not in row:
        return row

    def dirty(text: str) -> str:
        made = "[p]" + re.sub("  +", lambda run: run[0] * 2, text) + "[p]"
        assert preprocess(made) == text
        return made

    activity, _, context = row["query"].partition(": ")
    endings = [dirty(choice) for choice in row["choices"]]
    return {"activity_label": activity, "ctx_a": dirty(context), "ctx_b": "", "endings": endings} | {
        "label": str(row["gold"])
    }


def test_the_definitions_say_what_lm_eval_does(installed: dict[str, Path], data: Path) -> None:
    for name in NAMES:
        own = load_yaml(ROOT / "examples" / "evaluation" / "tasks_3shot" / f"{name}.yaml", recursive=False)
        theirs = load_yaml(installed[name])
        assert installed[name].match(f"tasks/{own['include']}")
        assert own["task"] == theirs["task"] == name
        assert own["metadata"]["prompt"] == theirs["doc_to_text"]
        assert own["metadata"]["reported_metric"] in [metric["metric"] for metric in theirs["metric_list"]]
        assert set(own) - {"include", "task", "metadata"} == ({"process_docs"} if name == "hellaswag" else set())
        text = (ROOT / "examples" / "evaluation" / "tasks_3shot" / f"{name}.yaml").read_text()
        assert ("test.jsonl where" in text) == ("test_split" in theirs and theirs["test_split"] is not None)


def test_the_split_of_lm_eval_is_scored_where_it_is_there(data: Path, tmp_path: Path) -> None:
    for name in ("arc_easy", "boolq"):
        for split, source in (("train", "train"), ("validation", "validation"), ("test", "train")):
            path = tmp_path / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text((data / "hub" / name / f"{source}.jsonl").read_text())
    tested, not_tested = (load_task(name, str(tmp_path), 0, 0) for name in ("arc_easy", "boolq"))
    assert (tested.split, len(tested.task.eval_docs)) == ("test", ROWS["train"])
    assert (not_tested.split, len(not_tested.task.eval_docs)) == ("validation", ROWS["validation"])


def test_the_digest_is_of_the_content(data: Path, tmp_path: Path) -> None:
    def copy(name: str, more: str) -> str:
        for split in ROWS:
            text = (data / "hub" / "boolq" / f"{split}.jsonl").read_text()
            (tmp_path / name / "boolq").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "boolq" / f"{split}.jsonl").write_text(text + more)
        return str(tmp_path / name)

    first, same, other = copy("a", ""), copy("b", ""), copy("c", "\n")
    assert digest(["boolq"], first) == digest(["boolq"], same) != digest(["boolq"], other)


@pytest.mark.parametrize("workers", [2, 3])
def test_shares_are_the_batches_of_one_process(workers: int, data: Path, models: Path) -> None:
    args = script.ScriptArguments(model=str(models / "llama"))
    model, tokenizer, _ = load_model(str(args.model), args.base_model, args.dtype, torch.device("cpu"))
    alone = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    rng = random.Random(1)
    # Prompts of all lengths, some asked twice, and continuations that differ in their last token.
    prompts = [[rng.randrange(1, 290) for _ in range(rng.randrange(1, 40))] for _ in range(30)] * 2
    requests = [(("", ""), prompt, [*prompt[:2], last]) for prompt in prompts for last in (5, 6)]
    expected = alone._loglikelihood_tokens(requests, disable_tqdm=True)
    shares = [share(requests, BATCH, rank, workers) for rank in range(workers)]
    assert sorted(place for places in shares for place in places) == list(range(len(requests)))
    for places in shares:
        answers = alone._loglikelihood_tokens([requests[i] for i in places], disable_tqdm=True)
        assert answers == [expected[i] for i in places]


def command(*arguments: str) -> list[str]:
    return ["--use_cpu", "--batch_size", str(BATCH), *arguments]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [SCRIPT, *command(*arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")


def test_two_processes_score_as_one(
    data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(models / "gpt2"), "--data_dir", str(data / "local")]
    launch = ["accelerate.commands.launch", "--config_file", "examples/launch/cpu_2.yaml", SCRIPT]
    run = [sys.executable, "-m", *launch, *command(*arguments, "--output_dir", str(tmp_path / "two"))]
    done = subprocess.run(run, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    call(monkeypatch, *arguments, "--output_dir", str(tmp_path / "one"))
    shown = capsys.readouterr().out
    assert done.stdout == shown
    assert "| ARC-Challenge |" in shown
    assert "were cut at the start, to 96 tokens" in shown
    one, two = (json.loads((tmp_path / name / "3shot.json").read_text()) for name in ("one", "two"))
    assert (one.pop("workers"), two.pop("workers")) == (1, 2)
    for key in ("seconds", "command"):
        assert one.pop(key) != two.pop(key)
    assert one == two

    call_compare = [SCRIPT, "--compare", str(tmp_path / "one"), str(tmp_path / "two"), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", call_compare)
    runpy.run_path(SCRIPT, run_name="__main__")
    table = capsys.readouterr().out
    assert table == (tmp_path / "3shot.md").read_text()
    assert table.count("**") == 2 * 2 * (len(NAMES) + 1) + 2


def test_a_model_without_a_card_flag_keeps_its_card(
    data: Path, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(models / "llama", tmp_path / "mine")
    card = tmp_path / "mine" / "README.md"
    card.write_text("# Mine\n")
    few = ["--model", str(tmp_path / "mine"), "--data_dir", str(data / "local"), "--tasks", "piqa", "--limit", "2"]
    call(monkeypatch, *few, "--num_fewshot", "0")
    assert card.read_text() == "# Mine\n"
    assert json.loads((tmp_path / "mine" / "0shot.json").read_text())["tasks"]["piqa"]["n"] == 2
    call(monkeypatch, *few, "--num_fewshot", "0", "--model_card")
    assert "acc, 0-shot, first 2 rows" in card.read_text()
    assert "| PIQA |" in card.read_text()


def _without(source: Path, target: Path, *patterns: str) -> str:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(*patterns))
    return str(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--model": "./nowhere"}, "--model ./nowhere: no such folder"),
        ({"--model": "nowhere/at_all"}, "--model nowhere/at_all: cannot be loaded"),
        ({"--model": "EMPTY"}, "no model there, neither config.json nor adapter_config.json"),
        ({"--model": "NO_TOKENIZER"}, "no tokenizer can be loaded.*save_pretrained"),
        ({"--model": "NO_WEIGHTS"}, "cannot be loaded as a causal language model"),
        ({"--model": "ADAPTER_ALONE"}, "does not name its base model. Give it with --base_model"),
        ({"--model": "ADAPTER", "--base_model": "GPT2"}, "does not go on .*gpt2.*--base_model"),
        ({"--base_model": "LLAMA"}, "is no adapter"),
        ({"--model": None}, "neither --model nor --compare"),
        ({"--compare": "EMPTY"}, "--model and --compare together"),
        ({"--model": None, "--compare": "EMPTY"}, "one run only"),
        ({"--tasks": "arc_easy mmlu"}, "--tasks mmlu: no such task. There are arc_easy, arc_challenge"),
        ({"--tasks": "boolq boolq"}, "named twice"),
        ({"--data_dir": "./nowhere"}, "--data_dir ./nowhere: no such folder"),
        ({"--data_dir": "EMPTY"}, "no arc_easy/train.jsonl there, which arc_easy needs"),
        ({"--limit": "0"}, "--limit 0: give 1 or more"),
        ({"--batch_size": "0"}, "--batch_size 0"),
        ({"--max_length": "2"}, "an answer has .* tokens, and the model takes 2"),
        ({"--num_fewshot": "-1"}, "--num_fewshot -1"),
        ({"--num_fewshot": "9"}, "--num_fewshot 9: arc_easy has 9 rows to draw from"),
        ({"--model_card": ""}, "--model_card: no README.md in .*llama"),
    ],
)
def test_what_was_given_and_why_not(
    changes: dict[str, str | None], message: str, data: Path, models: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    named = {"LLAMA": str(models / "llama"), "GPT2": str(models / "gpt2"), "ADAPTER": str(models / "adapter")}
    named["EMPTY"] = str(tmp_path / "empty")
    (tmp_path / "empty").mkdir()
    named["NO_TOKENIZER"] = _without(models / "llama", tmp_path / "a", "tokenizer*")
    named["NO_WEIGHTS"] = _without(models / "llama", tmp_path / "b", "*.safetensors")
    named["ADAPTER_ALONE"] = _without(models / "adapter", tmp_path / "c")
    path = tmp_path / "c" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    given: dict[str, str | None] = {"--model": named["LLAMA"], "--data_dir": str(data / "local"), **changes}
    arguments = [part for flag, value in given.items() if value is not None for part in (flag, *value.split())]
    with pytest.raises(SystemExit, match=message) as error:
        call(monkeypatch, *(named.get(part, part) for part in arguments))
    assert str(error.value.code).startswith("evaluate_3shot.py: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "not JSON lines"),
        ("\n", "no rows"),
        ('{"question": "a", "label": 1}\n', "every row must have the fields.*question passage label"),
        ('{"question": "a", "passage": "b", "label": 1}\n' * 2 + '{"question": "a", "passage": "b", "label": "x"}\n',
         "values of different types"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "boolq").mkdir()
    for split in ROWS:
        (tmp_path / "boolq" / f"{split}.jsonl").write_text(content)
    with pytest.raises(TaskError, match=rf"boolq/train\.jsonl: .*{message}"):
        load_task("boolq", str(tmp_path), 0, 0)
