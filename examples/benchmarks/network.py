"""What one data-parallel update costs, from the start of backward to updated parameters, by method and link.

    sudo python -m examples.benchmarks.network --workers 4 --rates 100mbit 1gbit 10gbit unlimited

Each worker has the parameters of a GPT-2, 9.2 M of them, and computes in one thread. As root on Linux, with iproute2
(`ip`, `tc`), each has its own network namespace, joined to the others by a bridge in one more, and `tc tbf` limits
both ends of each link: what a worker sends, and what it receives. Elsewhere the workers share the loopback, and only
the unlimited rate is measured. Nothing outside these namespaces is touched; they are removed at the end, and what a
killed run left behind by the next run.

With `--tokens 512` it is a whole step that is measured: forward and backward of a real GPT-2 on so many tokens, and the
update; and `computing`, the same with fused AdamW and no network, is what it can be at best.

- The loss is linear in the parameters, so that backward only writes the gradients, through autograd and DDP as in
  training; what is left to measure is the update. Every worker has gradients of its own.
- The methods take turns, so that noise of the machine meets all alike; a turn's first step is not counted.
- Before each step the workers wait for each other over pipes to the parent: no byte of that is on the link.
- A step takes as long as it takes the slowest worker. The forward pass is not part of it, without `--tokens`.
  `local_16` is AdamW on each worker and a vote every 16 steps: a step of it is the average of a round. In
  `local_16_streamed` four parts of the parameters vote in turn, and two more steps are made while a vote is under way.
- `bandwidth_by_rank` is what a copy reads and writes in a second, all workers at once: `hf_dlion plan` counts in it.
- Bytes sent are the difference of the interface's `tx_bytes`: TCP, acknowledgements and retransmissions too.
  The MTU is 1500, but a piece of up to 64 KiB that the kernel passes on whole (GSO) has one header there: a
  cable would carry about 5 % more, with every method. tbf limits by what a cable would carry.

It writes `results.json` (with the time of every step) and `step_time.png`, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from .links import UNLIMITED, BenchmarkError, bits_per_second, limit, namespaces
from .machine import machine
from .network_report import METHODS, WHOLE_STEP, plot, table
from .stopping import stop_on_signals
from .workers import TURNS, Workers, say

RATES = ("100mbit", "1gbit", "10gbit", UNLIMITED)
SETTINGS = ("workers", "methods", "hidden", "layers", "vocab", "tokens", "seed", "steps", "seconds")
WARMUP_STEPS = 6  # optimizers compile, DDP rebuilds its buckets, PowerSGD begins to compress
WARMUP_ROUNDS = 2  # of local steps


def why_loopback(options: argparse.Namespace) -> str | None:
    """Why there are no namespaces, or None if there are."""
    missing = [tool for tool in ("ip", "tc") if not shutil.which(tool)]
    reasons = {
        "--loopback": options.loopback,
        "they need Linux": sys.platform != "linux",
        "they need root": os.geteuid() != 0,
        f"no {' and no '.join(missing)} found, install iproute2": missing,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The whole benchmark. Returns what `results.json` holds."""
    rates = sorted(set(options.rates), key=bits_per_second)
    reason = why_loopback(options)
    if reason:
        say(f"No namespaces ({reason}): loopback, the unlimited rate only, no count of the interface.")
        rates = [UNLIMITED]
    options.interface = None if reason else "eth0"
    results: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        options.rendezvous = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "store")
        names = [] if reason else stack.enter_context(namespaces(options.workers))
        prefixes = [["ip", "netns", "exec", name] for name in names[:-1]] or [[]] * options.workers
        workers = stack.enter_context(contextlib.closing(Workers(options)))
        workers.start(prefixes)
        for method in options.methods:
            say(f"{method}: warming up")
            parameters: int = workers.ask(method, "prepare")[0]
            workers.steps(method, WARMUP_ROUNDS if method.startswith("local_") else WARMUP_STEPS)
        bandwidths: list[float] = workers.ask(options.methods[0], "bandwidth")
        for rate in rates:
            if names:
                limit(names, bits_per_second(rate))
            results += workers.measure(rate)
    for result in results:
        shares = options.workers * len(result["step_seconds"]) * parameters
        for counter in ("interface", "ledger"):
            sent = sum(result.get(f"{counter}_bytes_by_rank", []))
            result[f"{counter}_bits_per_parameter"] = 8 * sent / shares or None
    return {
        "command": shlex.join(["python", "-m", "examples.benchmarks.network", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "network": f"loopback ({reason})" if reason else "namespaces, veth and a bridge, tbf at both ends",
        "settings": {name: getattr(options, name) for name in SETTINGS} | {"parameters": parameters},
        "bandwidth_by_rank": bandwidths,
        "results": results,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=defaults, allow_abbrev=False)
    add = parser.add_argument
    add("--workers", type=int, default=4, help="how many, each a process of one thread")
    known = (*METHODS, *WHOLE_STEP)
    about_methods = f"to compare; all that there are by default. Known: {', '.join(known)}, the last ones with --tokens"
    add("--methods", nargs="+", choices=known, metavar="METHOD", help=about_methods)
    add("--tokens", type=int, default=0, help="of a worker's batch, for a whole step; 0: the update alone")
    add("--rates", nargs="+", default=RATES, metavar="RATE", help="of each link: 10mbit, 2.5gbit, ...")
    add("--steps", type=int, default=30, help="measured steps of a method at a rate, at most")
    add("--seconds", type=float, default=15, help=f"for these; slow methods take fewer, at least {TURNS}")
    add("--hidden", type=int, default=256, help="width of the model, a multiple of 64")
    add("--layers", type=int, default=6, help="of the model")
    add("--vocab", type=int, default=16384, help="rows of the model's embedding")
    add("--seed", type=int, default=0, help="of the weights; for a worker's gradients 1 and its rank are added")
    add("--timeout", type=float, default=300, help="seconds after which a step (or the start) has failed")
    add("--loopback", action="store_true", help="no namespaces and no limit, also as root")
    add("--output", type=Path, default=Path("network"), help="folder for results.json and step_time.png")
    add("--plot-only", type=Path, metavar="JSON", help="only draw and print this results.json again")
    options = parser.parse_args()
    usual = known if options.tokens else METHODS
    options.methods = list(dict.fromkeys(options.methods or usual))
    if not options.tokens and (unusual := set(options.methods) - set(METHODS)):
        parser.error(f"{', '.join(unusual)}: of a whole step only, with --tokens 512")
    if not 1 <= options.workers <= 250 or options.steps < 1 or options.hidden < 64 or options.hidden % 64:
        parser.error("--workers is 1 to 250, --steps at least 1, --hidden a multiple of 64")
    return options


def main() -> int:
    options = parse()
    stop_on_signals()
    try:
        folder: Path = options.plot_only.parent if options.plot_only else options.output
        if options.plot_only:
            report = json.loads(options.plot_only.read_text())
        else:
            folder.mkdir(parents=True, exist_ok=True)
            report = run(options)
            (folder / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        plot(report, folder / "step_time.png")
        print(table(report))
    except BenchmarkError as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt as error:
        say(f"{error}: ended, the workers and their namespaces are removed")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
