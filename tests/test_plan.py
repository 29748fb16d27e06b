"""What `hf_dlion plan` predicts, against what was measured and committed; nothing is timed here."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config

from examples.benchmarks.links import bits_per_second
from hf_dlion import plan
from hf_dlion.plan import METHODS, Setting, local_steps, predict, traffic

ROOT = Path(__file__).parents[1] / "model_cards"
BY_NAME = {method.name: method for method in METHODS} | {"local_16": local_steps(16)}
BY_NAME["dmuon_mavo_three_steps"] = BY_NAME["dmuon_three_steps"]  # as the benchmark called it before
BY_NAME["ddp_fp16"] = BY_NAME["ddp_bf16"]
BY_NAME["dlion_mavo_after"] = BY_NAME["dlion_mavo"]
BY_NAME["local_16_streamed"] = local_steps(16)
BY_NAME["dlion_mavo_alternate"] = replace(BY_NAME["dlion_mavo"], tie="alternate")
WRITING_GRADIENTS = 20  # bytes a parameter: all that forward and backward do in the benchmark of updates
CLOSE = 0.25


def measured(name: str) -> list[Any]:
    """The cells of a benchmark: report, result."""
    paths = sorted((ROOT / name).glob("*/results.json"))
    reports = [(path, json.loads(path.read_text())) for path in paths]
    return [
        pytest.param(report, result, id=f"{path.parent.name}-{result['rate']}-{result['method']}")
        for path, report in reports
        for result in report["results"]
        if result["method"] != "computing"
    ]


def bandwidth(workers: int, of_run: dict[str, Any]) -> float:
    """Of each worker of its machine. Each has one thread, and two of four share a core."""
    report = json.loads((ROOT / f"network/{workers}_workers/results.json").read_text())
    if report["machine"]["cpu"] != of_run["machine"]["cpu"]:
        report = of_run
    return statistics.median(report["bandwidth_by_rank"]) * min(1, report["machine"]["cores"] / workers)


@pytest.mark.parametrize(("report", "result"), measured("network"))
def test_every_cell_of_the_benchmark_is_predicted(report: dict[str, Any], result: dict[str, Any]) -> None:
    settings = report["settings"]
    own = bandwidth(settings["workers"], report)
    compute = WRITING_GRADIENTS * settings["parameters"] / own
    link = bits_per_second(result["rate"])
    setting = Setting(settings["parameters"], settings["workers"], link, compute, own, 2e-4)
    predicted = predict(BY_NAME[result["method"]], setting)
    assert predicted.step_seconds == pytest.approx(result["median"], rel=CLOSE)
    # Local steps' scales are small messages, whose headers count.
    headers = 0.05 if result["method"] == "local_16" else 0.015
    assert predicted.bits_per_parameter == pytest.approx(result["interface_bits_per_parameter"], rel=headers)
    if result["ledger_bits_per_parameter"]:
        assert predicted.bits_per_parameter == pytest.approx(result["ledger_bits_per_parameter"], rel=3e-3)


@pytest.mark.parametrize(("report", "result"), measured("whole_step"))
def test_every_whole_step_is_predicted(report: dict[str, Any], result: dict[str, Any]) -> None:
    settings = report["settings"]
    parameters, workers = settings["parameters"], settings["workers"]
    own = bandwidth(workers, report)
    computing = {one["rate"]: one["median"] for one in report["results"] if one["method"] == "computing"}
    compute = computing[result["rate"]] - plan.ALONE * parameters / own
    hidden = 12 * settings["layers"] * settings["hidden"] ** 2  # parameters in matrices
    orthogonal = plan.ORTHOGONAL * hidden / parameters * settings["hidden"] / settings["tokens"]
    setting = Setting(
        parameters, workers, bits_per_second(result["rate"]), compute, own, 2e-4, orthogonal, hidden=hidden / parameters
    )
    if result["method"] == "dlion_mavo_after":  # as on GPUs, where votes leave after backward
        setting = replace(setting, gpu=True)
    predicted = predict(BY_NAME[result["method"]], setting)
    assert predicted.step_seconds == pytest.approx(result["median"], rel=CLOSE)


def test_bytes_are_those_of_the_table_of_methods() -> None:
    def setting(workers: int, **more: float) -> Setting:
        return Setting(2**20, workers, 1e9, 1.0, 1e9, latency=0.0, **more)

    def bits(name: str, workers: int) -> float:
        return 8 * traffic(BY_NAME[name], setting(workers)).sent_bytes / 2**20

    assert bits("dlion_mavo", 2) == bits("dlion_avg", 2) == 1
    assert bits("dlion_mavo", 4) == 3 / 4 * 3
    assert bits("dmuon_mavo", 8) == 7 / 8 * 2
    averages = traffic(BY_NAME["dmuon_averages"], setting(4, hidden=0.75))
    assert 8 * averages.sent_bytes / 2**20 == 0.75 * 1.5 + 0.25 * 48
    assert 8 * averages.late_bytes / 2**20 == 0.25 * 48
    assert averages.late_buckets == 1
    assert bits("dlion_avg", 16) == 15 / 16 * (1 + 5)
    assert bits("ddp_fp32", 4) == 3 / 4 * 64
    assert bits("ddp_bf16", 2) == 16
    assert bits("ddp_powersgd", 4) == pytest.approx(3 / 4 * 64 * 4 * plan.FACTORS / 256)
    small = traffic(BY_NAME["ddp_powersgd"], setting(4, side=2.0))
    assert 8 * small.sent_bytes / 2**20 == bits("ddp_fp32", 4), "factors are no larger than what they stand for"
    assert {bits(name, 1) for name in BY_NAME} == {0}


def printed(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert plan.main([*words, "--bandwidth", "20"]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def test_a_slow_link_wants_votes_and_a_fast_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    slow = json.loads(printed(capsys, "124M", "--workers", "4", "--link", "1gbit", "--compute", "2", "--json"))
    assert slow["take"] == "dmuon_mavo"
    assert slow["setting"]["parameters"] == 124e6
    assert "with a vote every 16 local steps, a step would take" in slow["why"]
    rarely = printed(capsys, "124M", "--workers", "4", "--link", "1gbit", "--compute", "2", "--local_steps", "64")
    assert "every 64 local steps" in rarely
    times = [one["step_seconds"] for one in slow["predictions"]]
    assert times == sorted(times)
    fast = printed(capsys, "124M", "--workers", "4", "--link", "400Gbit/s", "--compute", "60")
    assert "Take ddp_fp32: the link is fast enough" in fast
    assert len(fast.splitlines()) == 6 + len(METHODS)


def test_what_it_says_to_take_is_no_slower_than_ddp(capsys: pytest.CaptureFixture[str]) -> None:
    taken = set()
    for link, compute, workers in itertools.product(("100mbit", "1gbit", "2.5gbit", "10gbit"), ("1", "8"), ("2", "8")):
        words = ["124M", "--workers", workers, "--link", link, "--compute", compute, "--json"]
        found = json.loads(printed(capsys, *words))
        seconds = {one["method"]: one["step_seconds"] for one in found["predictions"]}
        assert seconds[found["take"]] <= plan.CLOSE * min(seconds["ddp_fp32"], seconds["ddp_bf16"])
        taken.add(found["take"])
    assert taken > {"dmuon_mavo", "ddp_fp32"}
    assert "one worker sends nothing" in printed(capsys, "124M", "--workers", "1", "--link", "1gbit", "--compute", "1")


def test_powersgd_is_shown_and_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "1B", "--workers", "16", "--link", "100mbit", "--compute", "5", "--json"))
    assert [one["method"] for one in found["predictions"][:2]] == ["local_16", "ddp_powersgd"]
    assert found["take"] == "dmuon_mavo"


def test_gradient_votes_are_not_taken_where_nobody_has_timed_them() -> None:
    found = plan.report(Setting(124e6, 4, 1e9, 2.0, 3e12, 2e-4, orthogonal=0.2, gpu=True), 16)
    assert found["predictions"][0]["method"] == "gradient_votes"
    assert found["take"] == "dmuon_mavo"


def test_three_steps_of_orthogonalisation_take_less_than_five() -> None:
    setting = Setting(2**20, 4, 1e9, 1.0, 1e9, latency=0.0, orthogonal=0.5)
    five, three = (predict(BY_NAME[name], setting) for name in ("dmuon_mavo", "dmuon_three_steps"))
    assert five.sent_bytes == three.sent_bytes
    assert five.step_seconds - three.step_seconds == pytest.approx(0.5 * (1 - plan.IN_THREE_STEPS))


def test_averages_beside_votes_wait_for_the_link() -> None:
    method, parameters = BY_NAME["dmuon_averages"], 2**24
    slow, fast = (Setting(parameters, 4, link, 100.0, 1e9, latency=0.0, hidden=0.75) for link in (1e7, 2e7))
    voted, averaged = plan.FRAMES * parameters * 0.75 * 1.5, plan.FRAMES * parameters * 0.25 * 48
    one, other = predict(method, slow), predict(method, fast)
    assert one.network_seconds == pytest.approx((voted + averaged) / 1e7) == pytest.approx(2 * other.network_seconds)
    # Backward hides all votes but the last of six buckets, and half of the local work hides behind the rest.
    shown = (voted / 6 + averaged) / 1e7
    assert one.step_seconds == pytest.approx(100 + one.local_seconds + shown - min(one.local_seconds, shown) / 2)


def test_small_models_vote_after_backward() -> None:
    small, large = (Setting(parameters, 4, 1e6, 1e3, 1e9, latency=0.0) for parameters in (2**21, 2**21 + 1024))
    one, other = (predict(BY_NAME["dlion_mavo"], setting) for setting in (small, large))
    assert one.step_seconds > 1e3 + one.network_seconds
    assert other.step_seconds < 1e3 + other.local_seconds + other.network_seconds / 2 + 1


def test_on_gpus_only_what_a_hook_sends_hides_behind_backward(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["124M", "--workers", "4", "--link", "1gbit", "--compute", "2", "--json"]
    cpu, gpu = (json.loads(printed(capsys, *words, *more))["predictions"] for more in ([], ["--gpu"]))
    seconds = [{one["method"]: one["step_seconds"] for one in each} for each in (cpu, gpu)]
    waits = {name for name in seconds[0] if seconds[1][name] > seconds[0][name]}
    assert waits == {"dlion_mavo", "dlion_avg", "dmuon_mavo", "dmuon_avg", "dmuon_averages", "dmuon_three_steps"}
    assert plan.main([*words, "--gpu"]) == 2
    assert "--gpu without --bandwidth" in capsys.readouterr().err


def test_a_model_is_counted_from_its_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    GPT2Config().save_pretrained(tmp_path)
    out = printed(capsys, str(tmp_path), "--workers", "2", "--link", "1gbit", "--compute", "1", "--tokens", "1024")
    assert out.startswith("124,439,808 parameters")
    assert "164 % more with orthogonalising" in out
    counted = printed(capsys, "124.44M", "--workers", "2", "--link", "1gbit", "--compute", "1", "--tokens", "1024")
    assert "166 % more with orthogonalising" in counted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["some/model", "--workers", "2", "--link", "1gbit"], "'some/model' is no number of parameters"),
        (["124M", "--workers", "2", "--link", "fast"], "link rate 'fast' cannot be read"),
        (["124M", "--workers", "0", "--link", "1gbit"], "--workers 0 is too small; it is at least 1."),
        (["0M", "--workers", "2", "--link", "1gbit"], "'0M' is no number above 0"),
        (["1M", "--workers", "2", "--link", "1GBps"], "link rate '1GBps' cannot be read"),
        (["1M", "--workers", "2", "--link", "1gbit", "--latency", "nan"], "--latency nan is no number."),
        (["1M", "--workers", "2", "--link", "1gbit", "--compute", "inf"], "--compute inf is no number."),
    ],
)
def test_what_cannot_be_read_is_named(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in printed(capsys, "--compute", "1", *words, code=2)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (None, "The cause: the folder has no config.json"),
        ({"model_type": "llama", "hidden_size": 100, "num_attention_heads": 7}, "(100) is not a multiple"),
        ({"model_type": "gpt2", "n_embd": "abc"}, "n_embd"),
        ({"model_type": "gpt2", "activation_function": "nosuch"}, "The cause: KeyError: 'nosuch'"),
    ],
)
def test_a_configuration_of_which_no_model_is_made(
    config: Any, cause: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        Path(tmp_path, "config.json").write_text(json.dumps(config))
    said = printed(capsys, str(tmp_path), "--workers", "2", "--link", "1gbit", "--compute", "1", code=2)
    assert "is no number of parameters" in said
    assert cause in said


def test_numbers_as_people_write_them(capsys: pytest.CaptureFixture[str]) -> None:
    for count in ("1.2e9", "1,200,000,000", "1_200_000_000", "1.2B"):
        for link in ("1Gbit", "1gbit/s", "1Gbps", "1Gb/s", "1000 mbit"):
            out = printed(capsys, count, "--workers", "2", "--link", link, "--compute", "1")
            assert out.startswith("1,200,000,000 parameters, 2 workers, 1000 Mbit/s")
