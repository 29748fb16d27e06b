"""The tables and the model card section of the evaluation example."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from evaluation.score_table import (
    ResultsError,
    average,
    comparison_table,
    model_index_results,
    read_results,
    run_table,
    update_model_card,
)


def results(arc: float, boolq: float, **changes: Any) -> dict[str, Any]:
    tasks = {
        name: {
            "alias": alias,
            "metric": metric,
            "value": value,
            "stderr": 0.03,
            "n": 100,
            "dataset": name,
            "config": None,
            "split": "validation",
        }
        for name, alias, metric, value in (
            ("arc_easy", "ARC-Easy", "acc_norm", arc),
            ("boolq", "BoolQ", "acc", boolq),
        )
    }
    made = {
        "num_fewshot": 3,
        "limit": None,
        "seed": 1234,
        "data": {"source": "local files", "digest": "abc"},
        "tasks": tasks,
        "average": average(tasks),
        "versions": {"lm_eval": "0.4.13"},
    }
    return made | changes


def test_the_average_weighs_every_task_the_same() -> None:
    mean = results(0.5, 0.6)["average"]
    assert mean["value"] == pytest.approx(0.55)
    assert mean["stderr"] == pytest.approx(math.sqrt(2) * 0.03 / 2)
    one_row = {"a": {"value": 1.0, "stderr": None}, "b": {"value": 0.0, "stderr": 0.1}}
    assert average(one_row) == {"value": 0.5, "stderr": None}


def test_a_run_is_a_row_a_task() -> None:
    assert run_table(results(0.5, 0.625, limit=100)).splitlines() == [
        "| task | score | metric | rows |",
        "| --- | ---: | --- | ---: |",
        "| ARC-Easy | 50.0 ± 3.0 | acc_norm | 100 |",
        "| BoolQ | 62.5 ± 3.0 | acc | 100 |",
        "| average | 56.2 ± 2.1 | | |",
        "",
        "Percent ± standard error; 3-shot, first 100 rows, local files, lm-eval 0.4.13.",
    ]


def test_prompts_that_were_cut_are_counted_under_the_table() -> None:
    some = results(0.5, 0.625, truncated_requests=4, requests=20, max_length=96)
    said = "4 of 20 prompts were cut at the start, to 96 tokens."
    assert run_table(some).endswith(f"lm-eval 0.4.13. {said}")
    assert comparison_table({"a": some, "b": some}).count(said) == 1
    assert comparison_table({"a": results(0.3, 0.9), "b": some}).endswith(f"lm-eval 0.4.13. b: {said}")


def test_the_best_is_bold_and_the_second_underlined() -> None:
    table = comparison_table({"a": results(0.3, 0.9), "b": results(0.5, 0.1), "c": results(0.4, 0.2)})
    assert table.splitlines()[:5] == [
        "| run | ARC-Easy | BoolQ | average |",
        "| --- | ---: | ---: | ---: |",
        "| a | 30.0 ± 3.0 | **90.0** ± 3.0 | **60.0** ± 2.1 |",
        "| b | **50.0** ± 3.0 | 10.0 ± 3.0 | <u>30.0</u> ± 2.1 |",
        "| c | <u>40.0</u> ± 3.0 | <u>20.0</u> ± 3.0 | <u>30.0</u> ± 2.1 |",
    ]


def test_numbers_that_look_the_same_are_marked_the_same() -> None:
    runs = {"a": results(0.50001, 0.2), "b": results(0.50002, 0.2), "c": results(0.4, 0.2), "d": results(0.3, 0.2)}
    rows = comparison_table(runs).splitlines()[2:6]
    assert [row.split("|")[2].strip().split()[0] for row in rows] == ["**50.0**", "**50.0**", "<u>40.0</u>", "30.0"]
    assert all("**20.0**" in row for row in rows)


def write(folder: Path, content: Any, name: str = "3shot.json") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return str(folder)


def test_runs_are_labelled_by_folder_and_by_path_where_names_repeat(tmp_path: Path) -> None:
    content = results(0.3, 0.4)
    folders = [write(tmp_path / path, content) for path in ("adamw", "1/lion", "2/lion")]
    assert list(read_results(folders, 3)) == ["adamw", folders[1], folders[2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 10}, "--limit of a and b differ"),
        ({"seed": 1}, "--seed of a and b differ"),
        ({"data": {"source": "local files", "digest": "abd"}}, "the data of a and b differ.*abc.*abd"),
        ({"data": {"source": "hub"}}, "the data of a and b differ"),
        ({"num_fewshot": 0}, "--num_fewshot of a and b differ"),
        ({"tasks": {"boolq": results(0, 0)["tasks"]["boolq"]}}, "the tasks of a and b differ"),
    ],
)
def test_runs_that_do_not_compare_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folders = [write(tmp_path / "a", results(0.3, 0.4)), write(tmp_path / "b", results(0.3, 0.4, **changes))]
    with pytest.raises(ResultsError, match=message):
        read_results(folders, 3)


def test_the_seed_draws_shots_and_nothing_else(tmp_path: Path) -> None:
    runs = [results(0.3, 0.4, num_fewshot=0, seed=seed) for seed in (1, 2)]
    folders = [write(tmp_path / str(i), run, "0shot.json") for i, run in enumerate(runs)]
    assert len(read_results(folders, 0)) == 2


def test_folders_without_results_are_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good", results(0.3, 0.4))
    for other, message in (
        (str(tmp_path / "none"), "no 3shot.json there. Run"),
        (write(tmp_path / "odd", [1]), "not a result"),
        (good, "named twice"),
    ):
        with pytest.raises(ResultsError, match=message):
            read_results([good, other], 3)
    with pytest.raises(ResultsError, match="one run only"):
        read_results([good], 3)
    with pytest.raises(ResultsError, match=r"no 0shot.json there"):
        read_results([good, write(tmp_path / "b", results(0.3, 0.4))], 0)


CARD = """---
license: apache-2.0
tags:
- x
---

# A model

## Evaluation

Our own words.

## Licence

Apache.
"""


@pytest.mark.parametrize("text", [CARD, CARD.replace("## Evaluation\n\nOur own words.\n\n", ""), "# No metadata\n"])
def test_a_model_card_gets_the_results_once(text: str, tmp_path: Path) -> None:
    path = tmp_path / "my_model" / "README.md"
    path.parent.mkdir()
    path.write_text(text)
    zero = results(0.1, 0.2, num_fewshot=0)
    for made in (results(0.2, 0.3), zero, results(0.4, 0.5), zero):
        update_model_card(path, made)
    card = ModelCard.load(path)
    assert card.data.model_name == "my_model"
    found = {(r.dataset_name, r.metric_name): r.metric_value for r in card.data.eval_results}
    assert len(card.data.eval_results) == 4
    assert found[("ARC-Easy", "acc_norm, 3-shot")] == 40.0
    assert found[("BoolQ", "acc, 0-shot")] == 20.0
    body = path.read_text().partition("# ")[2]
    assert body.count("## Evaluation") == 1
    assert body.count("| ARC-Easy |") == 2
    assert "| ARC-Easy | 40.0 ± 3.0 |" in body
    if text is CARD:
        assert card.data.license == "apache-2.0"
        places = [body.index(part) for part in ("Our own words.", "40.0 ±", "10.0 ±", "## Licence", "Apache.")]
        assert places == sorted(places)
    before = path.read_text()
    update_model_card(path, zero)
    assert path.read_text() == before


def test_the_model_index_says_shots_and_limit() -> None:
    first, _ = model_index_results(results(0.12345, 0.5, limit=1))
    assert (first.metric_value, first.metric_name) == (12.35, "acc_norm, 3-shot, first 1 row")
    assert (first.dataset_type, first.dataset_split) == ("arc_easy", "validation")
