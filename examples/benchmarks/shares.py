"""What a part of a training step takes of it: models, clock, command line and results of such measurements."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from .machine import machine

SIZES = {"gpt2-tiny": (4, 4, 128), "gpt2-mini": (6, 5, 160), "gpt2-10m": (12, 4, 256)}  # layers, heads, width
VOCABULARY = 2048
WARMUP_STEPS = 3


def processor_seconds(work: Callable[[], Any]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def build_model(name: str, positions: int) -> PreTrainedModel:
    """The model that `pretrain_gpt2.py` has by this name, for blocks of so many tokens."""
    layers, heads, width = SIZES[name]
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    shape = {"n_layer": layers, "n_head": heads, "n_embd": width, "n_positions": positions, "vocab_size": VOCABULARY}
    return AutoModelForCausalLM.from_config(GPT2Config(**shape, **dropout, use_cache=False))


def report(
    model: str, parameters: int, tokens: int, shares: Sequence[float], times: Mapping[str, Sequence[float]], **more: Any
) -> dict[str, Any]:
    """The measurement of one model."""
    return {
        "model": model,
        "parameters": parameters,
        **more,
        "tokens_per_step": tokens,
        "share_median": statistics.median(shares),
        "share_quartiles": statistics.quantiles(shares, n=4),
        "processor_seconds": dict(times),
    }


def measure_shares(
    module: str,
    doc: str | None,
    what: str,
    measure: Callable[[str, int, int, int], dict[str, Any]],
    rows: int,
    steps: int,
) -> None:
    """Reads the command line, measures, writes `results.json`, and says the shares.

    Args:
        module: the benchmark's name.
        doc: its docstring.
        what: takes a share.
        measure: given model, rows, tokens of a row and steps, as `report` gives it.
        rows, steps: if none are given.
    """
    name = module.rpartition(".")[2]
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES, help="names of models")
    parser.add_argument("--rows", type=int, default=rows, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=steps, help="measured steps (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path(name), help=f"folder for results.json (default: {name})")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(model, options.rows, options.length, options.steps) for model in options.models]
    chosen = "" if options.models == list(SIZES) else f" --models {' '.join(options.models)}"
    command = f"python -m {module}{chosen} --rows {options.rows} --length {options.length}"
    options.output.mkdir(parents=True, exist_ok=True)
    results = {"command": f"{command} --steps {options.steps}", "machine": machine(), "models": found}
    Path(options.output, "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for one in found:
        low, _, high = one["share_quartiles"]
        print(
            f"{one['model']}, {one['parameters']:,} parameters, {one['tokens_per_step']} tokens a step: {what} "
            f"{one['share_median']:.2%} of it (quartiles {low:.2%} to {high:.2%})"
        )
