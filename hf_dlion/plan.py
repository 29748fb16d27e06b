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
from pathlib import Path
from typing import Any

FRAMES = 1.05  # what Ethernet and TCP headers add
BACKWARD = 2 / 3  # of forward and backward
DDP_BUCKET = 25 << 20  # bytes
CLOSE = 1.05  # two predictions that differ by less are the same
WORTH = 1.2  # so much longer may a step be of a method that trains better
# Or better, in most of the studies.
AS_GOOD_AS_ADAMW = ("dmuon_mavo", "dmuon_avg", "dmuon_averages", "ddp_fp32", "ddp_bf16")
# Orthogonalising, of forward and backward: so many times the smaller side of the matrices, in the mean over all
# parameters, over the tokens of a step. 2.2 to 3.7 in model_cards/orthogonal and whole_step; about 4 by the operations.
ORTHOGONAL = 3.2
# In three steps: 0.6 of that by the operations. CPUs that multiply bfloat16 take 0.32 to 0.39 (model_cards/orthogonal).
IN_THREE_STEPS = 0.6
# Elements of both factors of rank 1, over those of a matrix: so many over its smaller side, 1 to 2 by its shape.
FACTORS = 1.33
VOCABULARY = 50257  # of a model of which only the number of parameters is given

SUMMARY = "Predict the time and the bytes of a training step, for votes and for DDP."

_PER_SECOND = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


@dataclass(frozen=True)
class Traffic:
    """What a method sends in a step.

    Attributes:
        sent_bytes: by each worker.
        buckets: in how many conversations, one after the other.
        rounds: how often each of them waits for the network.
        early: whether buckets leave during backward.
        late_bytes: of those sent, the ones that leave after backward in any case.
        late_buckets: their conversations.
    """

    sent_bytes: float
    buckets: int
    rounds: int
    early: bool = False
    late_bytes: float = 0.0
    late_buckets: int = 0


@dataclass(frozen=True)
class Method:
    """What the prediction knows of a method.

    Attributes:
        name: as ``optim=`` takes it; ``dmuon_averages`` stands for dmuon_mavo with ``muon_rest="average"``,
            ``dmuon_three_steps`` for it with ``muon_ns_steps=3``, ``gradient_votes`` for votes with AdamW behind them,
            ``ddp_`` for DDP, ``ddp_powersgd`` with PowerSGD of rank 4, in one bucket.
        memory: bytes that its local work moves through memory, per parameter: what its measured time is at the rate of
            a copy; first those of every step, then those per bit that is sent.
        aggregation: of what votes; None for DDP.
        tie: of the votes.
        bytes_sent: of what DDP sends of a parameter.
        orthogonal: how long it orthogonalises, where 1 is five steps.
        every: steps from one vote to the next.
        hook: whether a hook of DDP sends during backward, on GPUs as well; others do so on CPUs.
        averages_rest: whether what is no hidden matrix is averaged in 32 bits, in place of votes.
        rank: of the factors that are averaged in place of gradients, after backward; 0 for none.
    """

    name: str
    memory: tuple[float, float]
    aggregation: str | None = None
    tie: str = "zero"
    bytes_sent: int = 0
    orthogonal: float = 0.0
    every: int = 1
    hook: bool = False
    averages_rest: bool = False
    rank: int = 0


# Fitted to model_cards/network, at the rate of a copy measured there; update included.
ALONE = 28.0  # AdamW's memory per parameter: read parameter, gradient and two states, write three
OF_AVERAGES = 2.4  # bytes moved per bit of an average that is sent
_VOTE = (38.0, 24.0)
METHODS = (
    Method("dmuon_mavo", _VOTE, "mavo", "alternate", orthogonal=1.0),
    Method("dmuon_avg", _VOTE, "avg", orthogonal=1.0),
    Method("dmuon_three_steps", _VOTE, "mavo", "alternate", orthogonal=IN_THREE_STEPS),
    Method("dmuon_averages", _VOTE, "mavo", "alternate", orthogonal=1.0, averages_rest=True),
    Method("dlion_mavo", _VOTE, "mavo"),
    Method("dlion_avg", _VOTE, "avg"),
    # AdamW, the exchange, and the hook's own passes, 0.8 ns a parameter, timed once on the same machine.
    Method("gradient_votes", (60.0, 24.0), "avg", hook=True),
    Method("ddp_fp32", (ALONE, OF_AVERAGES), bytes_sent=4, hook=True),
    Method("ddp_bf16", (ALONE, 5.5), bytes_sent=2, hook=True),
    Method("ddp_powersgd", (270.0, OF_AVERAGES), bytes_sent=4, rank=4),
)


def local_steps(every: int) -> Method:
    """AdamW on each worker, and a vote on what it moved by every so many steps."""
    return Method(f"local_{every}", (52.0, 24.0), "mavo", "alternate", every=every)


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
        orthogonal: what orthogonalising adds, as a share of ``compute``.
        gpu: whether the models are on GPUs.
        hidden: the share of the parameters that are hidden matrices.
        side: the smaller side of the hidden matrices, in the mean.
    """

    parameters: float
    workers: int
    link: float
    compute: float
    bandwidth: float
    latency: float
    orthogonal: float = 0.0
    gpu: bool = False
    hidden: float = 1.0
    side: float = 256.0


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


def traffic(method: Method, setting: Setting) -> Traffic:
    """What it sends in a step with an exchange."""
    from .bits.packing import BLOCK
    from .optim.averages import BUCKET
    from .optim.displacements import SCALED
    from .optim.layout import blocks_a_bucket
    from .optim.overlap import BUCKETS
    from .wire.exchange import GatherExchange, ShardedExchange, highest_level

    parameters, workers = setting.parameters, setting.workers
    if workers == 1:
        return Traffic(0, 1, 0)
    ring = 2 * (workers - 1)
    if method.rank:
        factors = ring / workers * method.bytes_sent * parameters * min(1.0, method.rank * FACTORS / setting.side)
        return Traffic(factors, 1, 2 * ring, late_bytes=factors, late_buckets=2)
    if method.aggregation is None:
        of_parameters = method.bytes_sent * parameters
        return Traffic(ring / workers * of_parameters, math.ceil(4 * parameters / DDP_BUCKET), ring, early=True)
    voted = parameters * setting.hidden if method.averages_rest else parameters
    words = math.ceil(voted / BLOCK) * BLOCK // 32
    planes = highest_level(method.aggregation, method.tie, workers).bit_length()
    sent = {kind: kind.words_sent(words, workers, planes) for kind in (GatherExchange, ShardedExchange)}
    kind = min(sent, key=lambda one: sent[one])
    rounds = 1 if kind is GatherExchange else 2
    if method.every > 1:
        scales = 4 * parameters / SCALED
        return Traffic(4 * sent[kind] + ring / workers * scales, math.ceil(parameters / BUCKET), rounds + ring)
    averages = ring / workers * 4 * (parameters - voted)
    late = math.ceil((parameters - voted) / BUCKET)
    early = method.hook or not setting.gpu
    if method.hook:
        buckets = math.ceil(4 * parameters / DDP_BUCKET)
    else:
        blocks = math.ceil(voted / BLOCK)
        buckets = math.ceil(blocks / blocks_a_bucket(blocks, BUCKETS if early else kind.buckets, setting.gpu))
    return Traffic(4 * sent[kind] + averages, buckets, rounds, early, averages, late)


def predict(method: Method, setting: Setting) -> Prediction:
    """A whole step of each worker, or the average of a round of local steps.

    Buckets are complete at even intervals of backward, and what the network takes is hidden behind what is left of it;
    not so for local steps, PowerSGD, averages beside votes, models that make one bucket, nor, on GPUs, for votes that
    no hook sends. Half of the rest hides behind the local work, or the other way round, where there are several.
    """
    sent = traffic(method, setting)
    sent_bytes = sent.sent_bytes / method.every
    fixed, of_bits = method.memory
    of_votes = 8 * (sent_bytes - sent.late_bytes) * of_bits
    moved = fixed * setting.parameters + of_votes + 8 * sent.late_bytes * OF_AVERAGES
    local = moved / setting.bandwidth
    late = FRAMES * 8 * sent.late_bytes / setting.link + 2 * sent.late_buckets * setting.latency
    early = FRAMES * 8 * (sent_bytes - sent.late_bytes) / setting.link
    early += sent.buckets * sent.rounds / method.every * setting.latency
    shown = early
    if sent.early:
        last = 1 / sent.buckets
        shown = max(last * early, early - (1 - last) * BACKWARD * setting.compute)
    shown += late
    if sent.buckets > 1:
        shown -= min(local, shown) / 2
    compute = setting.compute * (1 + setting.orthogonal * method.orthogonal)
    alone = setting.compute + setting.parameters * ALONE / setting.bandwidth
    step = compute + local + shown
    bits = 8 * sent_bytes / setting.parameters
    return Prediction(method.name, step, step / alone, local, early + late, sent_bytes, bits)


def recommend(predictions: Sequence[Prediction], local: Prediction) -> tuple[str, str]:
    """The name of the method to take, and why; what local steps would win is said where it is much."""
    by_name = {one.method: one for one in predictions}
    fastest = min(predictions, key=lambda one: one.step_seconds)
    good = min((by_name[name] for name in AS_GOOD_AS_ADAMW), key=lambda one: one.step_seconds)
    if not by_name["ddp_fp32"].sent_bytes:
        return "ddp_fp32", "one worker sends nothing: stay with your optimizer"
    if by_name["ddp_fp32"].step_seconds <= CLOSE * fastest.step_seconds:
        return "ddp_fp32", "the link is fast enough for averaged gradients: stay with your optimizer"
    name, why = fastest.method, "the fastest of the compared ones that exchange at every step"
    if good.step_seconds <= WORTH * fastest.step_seconds:
        name = good.method
        why = "of those that train as well as AdamW or better, the fastest that exchanges at every step"
    if by_name[name].step_seconds > WORTH * local.step_seconds:
        every = local.method.partition("_")[2]
        why += f"; with a vote every {every} local steps, a step would take {local.step_seconds:.3g} s"
    return name, why


def shape_of(model: str) -> tuple[float, float, float]:
    """How many parameters a model has, the mean smaller side of their matrices (0 for others), and the matrices' share.

    Args:
        model: a count such as 124M, or what has a configuration.

    Raises:
        ValueError: it is neither a count, nor a folder with a config.json, nor in the cache of the hub.
    """
    count = re.fullmatch(r"([\d.]+(?:e\d+)?)([kmbt]?)", re.sub("[,_]", "", model.lower()))
    if count:
        parameters = _number(count, _COUNTS, model)
        return parameters, *_usual_matrices(parameters)
    try:
        import torch
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        from .optim.hidden import hidden_matrices, matrices_of

        config = AutoConfig.from_pretrained(model, local_files_only=True)
        kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
        with torch.device("meta"):
            made = kind.from_config(config)
    except Exception as error:  # a configuration, or code that comes with one, can raise anything
        folder = Path(model).is_dir() and not Path(model, "config.json").exists()
        cause = (
            "the folder has no config.json" if folder else " ".join(f"{type(error).__name__}: {error}".split())[:300]
        )
        raise ValueError(
            f"{model!r} is no number of parameters, and no model could be laid out by a configuration of that name: "
            f"nothing is downloaded. Give a number, such as 124M, or a folder with a config.json. The cause: {cause}"
        ) from error
    parameters = float(sum(parameter.numel() for parameter in made.parameters()))
    hidden = [group for group in hidden_matrices(made) if group["orthogonal"]]
    matrices = [
        part for group in hidden for _, weight in group["params"] for part in matrices_of(weight, group["split"])
    ]
    side = sum(min(matrix.shape) * matrix.numel() for matrix in matrices) / parameters
    return parameters, side, sum(matrix.numel() for matrix in matrices) / parameters


def _usual_matrices(parameters: float) -> tuple[float, float]:
    """The same mean and share, of a GPT-2 whose depth is a 64th of its width, with 12 squares of the width a layer."""
    narrow, wide = 0.0, parameters ** (1 / 2)
    for _ in range(60):
        width = (narrow + wide) / 2
        hidden = 12 / 64 * width**3
        narrow, wide = (narrow, width) if hidden + VOCABULARY * width > parameters else (width, wide)
    return hidden / parameters * width, hidden / parameters


def link_rate(text: str) -> float:
    """Bits per second, of 100mbit, 2.5Gbit, 10gbit/s.

    Raises:
        ValueError: it is not of that form.
    """
    rate = re.fullmatch(r"([\d.]+)\s*([kmgtKMGT]?)(?:[bB]it(?:/s|ps)?|bps|b/s)", text)  # B is a byte
    if not rate:
        raise ValueError(
            f"link rate {text!r} cannot be read: it is a number of bits a second, such as 100mbit, 1Gbit or 1Gbps."
        )
    return _number(rate, _PER_SECOND, text)


def measured_bandwidth() -> float:
    """Bytes per second read and written by a copy of 64 MiB in this process: the best of eight."""
    import torch

    source = torch.ones(16 << 20, dtype=torch.float32)
    target = torch.empty_like(source)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def report(setting: Setting, every: int) -> dict[str, Any]:
    """The setting, the predictions, the fastest first, and which method to take."""
    predictions, local = [predict(method, setting) for method in METHODS], predict(local_steps(every), setting)
    # Nobody has compared here how PowerSGD trains, nor timed votes on gradients on a GPU.
    left_out = {"ddp_powersgd"} | ({"gradient_votes"} if setting.gpu else set())
    name, why = recommend([one for one in predictions if one.method not in left_out], local)
    ordered = sorted([*predictions, local], key=lambda one: one.step_seconds)
    return {"setting": asdict(setting), "predictions": [asdict(one) for one in ordered], "take": name, "why": why}


def table(found: dict[str, Any]) -> str:
    """A report, to be read."""
    setting = Setting(**found["setting"])
    lines = [
        f"{setting.parameters:,.0f} parameters, {setting.workers} workers, {setting.link / 1e6:g} Mbit/s each way, "
        f"{setting.compute:g} s of forward and backward, {100 * setting.orthogonal:.0f} % more with orthogonalising, "
        f"memory at {setting.bandwidth / 1e9:.1f} GB/s",
        "",
        f"{'':17} {'step, s':>10} {'x alone':>8} {'local, s':>9} {'network, s':>11} {'MB sent':>9} {'bits/param':>11}",
    ]
    for one in (Prediction(**each) for each in found["predictions"]):
        lines.append(
            f"{one.method:17} {one.step_seconds:10.3f} {one.over_alone:8.2f} {one.local_seconds:9.3f} "
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
    about_tokens = "of a worker's step; the fewer, the more orthogonalising adds to compute (default: %(default)s)"
    add("--tokens", type=int, default=8192, help=about_tokens)
    add("--local_steps", type=int, default=16, metavar="H", help="of the row for local steps (default: %(default)s)")
    add("--gpu", action="store_true", help="on GPUs votes leave after backward; needs their --bandwidth")
    add("--bandwidth", type=float, metavar="GB/S", help="of a worker's memory, read and written; else a copy is timed")
    add("--latency", type=float, default=0.2, metavar="MS", help="of a round (default: %(default)s)")
    add("--json", action="store_true", help="print JSON")


def run(options: argparse.Namespace) -> int:
    """Print what was asked for. Returns the exit code."""
    try:
        _check(options)
        bandwidth = measured_bandwidth() if options.bandwidth is None else 1e9 * options.bandwidth
        (parameters, side, hidden), link = shape_of(options.model), link_rate(options.link)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    setting = Setting(
        parameters,
        options.workers,
        link,
        options.compute,
        bandwidth,
        latency=options.latency / 1e3,
        orthogonal=ORTHOGONAL * side / options.tokens,
        gpu=options.gpu,
        hidden=hidden,
        side=max(side / max(hidden, 1e-9), 1.0),
    )
    found = report(setting, options.local_steps)
    sys.stdout.write((json.dumps(found, indent=1) if options.json else table(found)) + "\n")
    return 0


def _check(options: argparse.Namespace) -> None:
    for name, least in (("workers", 1), ("compute", 0), ("latency", 0), ("tokens", 1), ("local_steps", 2)):
        value = getattr(options, name)
        if value < least:
            raise ValueError(f"--{name} {value:g} is too small; it is at least {least}.")
        if not math.isfinite(value):
            raise ValueError(f"--{name} {value:g} is no number.")
    if options.gpu and options.bandwidth is None:
        raise ValueError("--gpu without --bandwidth: the copy that is timed would be the CPU's. Give the GPU's rate.")
    if options.bandwidth is not None and not 0 < options.bandwidth < math.inf:
        raise ValueError(f"--bandwidth {options.bandwidth:g}: it is a number of GB/s above 0.")


def main(arguments: Sequence[str] | None = None) -> int:
    """``python -m hf_dlion.plan``."""
    parser = argparse.ArgumentParser(prog="python -m hf_dlion.plan", description=SUMMARY)
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def _number(found: re.Match[str], units: dict[str, float], text: str) -> float:
    try:
        value = float(found[1]) * units[found[2].lower()]
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise ValueError(f"{text!r} is no number above 0.")
    return value


if __name__ == "__main__":
    sys.exit(main())
