"""What a step will take, before it is run: ``hf_dlion plan 124M --workers 4 --link 1gbit --compute 0.8``.

Bytes are those of the exchanges. Seconds are a model: forward and backward, the local work of the method over the rate
at which memory is copied, and the network. ``docs/benchmarks.md`` says how far that is from what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

FRAMES = 1.05  # what Ethernet and TCP headers add
BACKWARD = 2 / 3  # of forward and backward
DDP_BUCKET = 25 << 20  # bytes
CLOSE = 1.05  # two predictions that differ by less are the same
WORTH = 1.2  # so much longer may a step be of the method that trained best in the studies
# Orthogonalising, of forward and backward: 6 to 9 % in model_cards/orthogonal.
ORTHOGONAL = 0.08

_PER_SECOND = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Traffic:
    """What a method sends in a step.

    Attributes:
        sent_bytes: by each worker.
        buckets: in how many conversations, one after the other.
        rounds: how often each of them waits for the network.
    """

    sent_bytes: float
    buckets: int
    rounds: int


@dataclass(frozen=True)
class Method:
    """What the prediction knows of a method.

    Attributes:
        name: as ``optim=`` takes it; ``gradient_votes`` stands for votes with AdamW behind them, ``ddp_`` for DDP.
        memory: bytes that its local work moves through memory, per parameter: what its measured time is at the rate of
            a copy. By the number of rounds of a bucket, where it votes.
        aggregation: of what votes; None for DDP.
        bytes_sent: of what DDP sends of a parameter.
        overlaps: whether it is on its way while backward computes.
        orthogonal: whether it orthogonalises.
    """

    name: str
    memory: tuple[float, float]
    aggregation: str | None = None
    tie: str = "zero"
    bytes_sent: int = 0
    overlaps: bool = False
    orthogonal: bool = False


# Fitted to model_cards/network, at the rate of a copy that model_cards/step has for AdamW; update included.
_VOTE, _DDP = (75.0, 115.0), (145.0, 145.0)
METHODS = (
    Method("dmuon_mavo", _VOTE, "mavo", "alternate", orthogonal=True),
    Method("dmuon_avg", _VOTE, "avg", orthogonal=True),
    Method("dlion_mavo", _VOTE, "mavo"),
    Method("dlion_avg", _VOTE, "avg"),
    # AdamW, the exchange, and the hook's own 8 ns a parameter, timed once on the same machine.
    Method("gradient_votes", (240.0, 260.0), "avg", overlaps=True),
    Method("ddp_fp32", _DDP, bytes_sent=4, overlaps=True),
    Method("ddp_bf16", (155.0, 155.0), bytes_sent=2, overlaps=True),
)
ALONE = 28.0  # AdamW's memory per parameter: read parameter, gradient and two states, write three


@dataclass(frozen=True)
class Setting:
    """What a step is predicted for.

    Attributes:
        parameters: that are trained.
        workers: N.
        link: bits per second that a worker can send, and receive at once.
        compute: seconds of forward and backward.
        bandwidth: bytes per second that a worker's memory is read and written at, together, by a copy.
        latency: seconds of a round, besides its bytes.
    """

    parameters: float
    workers: int
    link: float
    compute: float
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Prediction:
    """Of one method.

    Attributes:
        method: its name.
        step_seconds: of a whole step.
        over_alone: times as long as one worker takes by itself, with AdamW.
        local_seconds: of it, the processor's for the update and the exchange.
        network_seconds: that the bytes are on the link.
        sent_bytes: by each worker and step, without headers of the network.
        bits_per_parameter: of these.
    """

    method: str
    step_seconds: float
    over_alone: float
    local_seconds: float
    network_seconds: float
    sent_bytes: float
    bits_per_parameter: float


def traffic(method: Method, parameters: float, workers: int) -> Traffic:
    """What it sends in a step."""
    from .bits.packing import BLOCK
    from .optim.layout import MAX_BUCKET_BLOCKS
    from .wire.exchange import GatherExchange, ShardedExchange, highest_level

    if workers == 1:
        return Traffic(0, 1, 0)
    if method.aggregation is None:
        of_parameters = method.bytes_sent * parameters
        rounds = 2 * (workers - 1)
        return Traffic(rounds / workers * of_parameters, math.ceil(4 * parameters / DDP_BUCKET), rounds)
    words = math.ceil(parameters / BLOCK) * BLOCK // 32
    planes = highest_level(method.aggregation, method.tie, workers).bit_length()
    sent = {kind: kind.words_sent(words, workers, planes) for kind in (GatherExchange, ShardedExchange)}
    kind = min(sent, key=lambda one: sent[one])
    fewest = math.ceil(parameters / BLOCK / MAX_BUCKET_BLOCKS)
    return Traffic(4 * sent[kind], max(kind.buckets, fewest), 1 if kind is GatherExchange else 2)


def predict(method: Method, setting: Setting) -> Prediction:
    """A whole step of each worker.

    The network is hidden behind backward where a method overlaps, but for the last bucket, and half of the rest behind
    the local work, or the other way round, where there are several buckets.
    """
    sent = traffic(method, setting.parameters, setting.workers)
    memory = method.memory[max(sent.rounds, 1) - 1] if method.aggregation else method.memory[0]
    local = setting.parameters * memory / setting.bandwidth
    network = FRAMES * 8 * sent.sent_bytes / setting.link + sent.buckets * sent.rounds * setting.latency
    shown = network
    if method.overlaps:
        shown = max(network / sent.buckets, network - BACKWARD * setting.compute)
    if sent.buckets > 1:
        shown -= min(local, shown) / 2
    compute = setting.compute * (1 + ORTHOGONAL * method.orthogonal)
    alone = setting.compute + setting.parameters * ALONE / setting.bandwidth
    step = compute + local + shown
    bits = 8 * sent.sent_bytes / setting.parameters
    return Prediction(method.name, step, step / alone, local, network, sent.sent_bytes, bits)


def recommend(predictions: Sequence[Prediction]) -> tuple[str, str]:
    """The name of the method to take, and why."""
    by_name = {one.method: one for one in predictions}
    fastest = min(predictions, key=lambda one: one.step_seconds)
    if by_name["ddp_fp32"].step_seconds <= CLOSE * fastest.step_seconds:
        return "ddp_fp32", "the link is fast enough for averaged gradients: stay with your optimizer"
    if by_name["dmuon_mavo"].step_seconds <= WORTH * fastest.step_seconds:
        return "dmuon_mavo", "the one that trained best in the studies, and about as fast as any"
    return fastest.method, "the fastest"


def parameter_count(model: str) -> float:
    """How many parameters a model has, by a count such as 124M, or by its configuration.

    Raises:
        ValueError: it is neither a count, nor a folder with a config.json, nor in the cache of the hub.
    """
    count = re.fullmatch(r"([\d.]+)([kmbt]?)", model.lower())
    if count:
        return _number(count, _COUNTS, model)
    try:
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(model, local_files_only=True)
        kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
        with torch.device("meta"):
            return float(sum(parameter.numel() for parameter in kind.from_config(config).parameters()))
    except (ImportError, OSError, ValueError) as error:
        cause = str(error).partition("\n")[0]
        raise ValueError(
            f"{model!r} is no number of parameters, and no configuration was found by that name here: nothing is "
            f"downloaded. Give a number, such as 124M, or a folder with a config.json. The cause: {cause}"
        ) from error


def link_rate(text: str) -> float:
    """Bits per second, of 100mbit, 2.5Gbit, 10gbit/s.

    Raises:
        ValueError: it is not of that form.
    """
    rate = re.fullmatch(r"([\d.]+)\s*([kmgt]?)bit(?:/s|ps)?", text.lower())
    if not rate:
        raise ValueError(
            f"link rate {text!r} cannot be read: it is a number of bits a second, such as 100mbit or 1Gbit."
        )
    return _number(rate, _PER_SECOND, text)


def measured_bandwidth() -> float:
    """Bytes per second read and written by a copy of 64 MiB in this process: the best of eight."""
    import torch

    source = torch.ones(16 << 20)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def report(setting: Setting) -> dict[str, Any]:
    """The setting, the predictions, the fastest first, and which method to take."""
    predictions = sorted((predict(method, setting) for method in METHODS), key=lambda one: one.step_seconds)
    name, why = recommend(predictions)
    return {"setting": asdict(setting), "predictions": [asdict(one) for one in predictions], "take": name, "why": why}


def table(found: dict[str, Any]) -> str:
    """A report, to be read."""
    setting = Setting(**found["setting"])
    lines = [
        f"{setting.parameters:,.0f} parameters, {setting.workers} workers, {setting.link / 1e6:g} Mbit/s each way, "
        f"{setting.compute:g} s of forward and backward, memory at {setting.bandwidth / 1e9:.1f} GB/s",
        "",
        f"{'':14} {'step, s':>10} {'x alone':>8} {'local, s':>9} {'network, s':>11} {'MB sent':>9} {'bits/param':>11}",
    ]
    for one in (Prediction(**each) for each in found["predictions"]):
        lines.append(
            f"{one.method:14} {one.step_seconds:10.3f} {one.over_alone:8.2f} {one.local_seconds:9.3f} "
            f"{one.network_seconds:11.3f} {one.sent_bytes / 1e6:9.1f} {one.bits_per_parameter:11.2f}"
        )
    return "\n".join([*lines, "", f"Take {found['take']}: {found['why']}."])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    add = parser.add_argument
    add("model", help="a number of parameters (124M, 1.5B), a folder with a config.json, or a hub id in the cache")
    add("--workers", type=int, required=True, help="how many")
    add("--link", required=True, metavar="RATE", help="what a worker's link carries each way: 100mbit, 1Gbit")
    add("--compute", type=float, required=True, metavar="SECONDS", help="forward and backward of a step, on one worker")
    add("--bandwidth", type=float, metavar="GB/S", help="of a worker's memory, read and written; else a copy is timed")
    add("--latency", type=float, default=0.2, metavar="MS", help="of a round (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print what was asked for. Returns the exit code."""
    try:
        if options.workers < 1 or options.compute < 0 or options.latency < 0 or (options.bandwidth or 1) <= 0:
            raise ValueError(
                f"workers={options.workers}, compute={options.compute:g}, latency={options.latency:g}, bandwidth="
                f"{options.bandwidth}: there is at least one worker, there is memory, and times are not negative."
            )
        bandwidth = measured_bandwidth() if options.bandwidth is None else 1e9 * options.bandwidth
        parameters, link = parameter_count(options.model), link_rate(options.link)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    found = report(Setting(parameters, options.workers, link, options.compute, bandwidth, options.latency / 1e3))
    sys.stdout.write((json.dumps(found, indent=1) if options.json else table(found)) + "\n")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m hf_dlion.plan``."""
    parser = argparse.ArgumentParser(prog="python -m hf_dlion.plan", description=(__doc__ or "").partition("\n")[0])
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _number(found: re.Match[str], units: dict[str, float], text: str) -> float:
    try:
        value = float(found[1]) * units[found[2]]
    except ValueError:
        value = 0.0
    if value <= 0:
        raise ValueError(f"{text!r} is no number above 0.")
    return value


if __name__ == "__main__":
    sys.exit(main())
