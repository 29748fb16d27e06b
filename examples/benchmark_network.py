#!/usr/bin/env python
"""What one data-parallel update costs, from the start of backward to updated parameters, by method and link.

    sudo python examples/benchmark_network.py --workers 4 --rates 100mbit 1gbit 10gbit unlimited

Each worker has the parameters of a GPT-2, 9.2 M of them, and computes in one thread. As root on Linux, with iproute2
(`ip`, `tc`), each has its own network namespace, joined to the others by a bridge in one more, and `tc tbf` limits
both ends of each link: what a worker sends, and what it receives. Elsewhere the workers share the loopback, and only
the unlimited rate is measured. Nothing outside these namespaces is touched; they are removed at the end, and what a
killed run left behind by the next run.

- The loss is linear in the parameters, so that backward only writes the gradients, through autograd and DDP as in
  training; what is left to measure is the update. Every worker has gradients of its own.
- The methods take turns, so that noise of the machine meets all alike; a turn's first step is not counted.
- Before each step the workers wait for each other over pipes to the parent: no byte of that is on the link.
- A step takes as long as it takes the slowest worker. The forward pass is not part of it.
- Bytes sent are the difference of the interface's `tx_bytes`: TCP, acknowledgements and retransmissions too.
  The MTU is 1500, but a piece of up to 64 KiB that the kernel passes on whole (GSO) has one header there: a
  cable would carry about 5 % more, with every method. tbf limits by what a cable would carry.
- tbf's bucket holds 72 KiB, or what 0.5 ms let through if that is more, so that such a piece passes whole. So
  much of each step is free of the limit.

It writes `results.json` (with the time of every step) and `step_time.png`, and prints a Markdown table.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

from network_report import METHODS, UNLIMITED, BenchmarkError, bits_per_second, plot, table

RATES = ("100mbit", "1gbit", "10gbit", UNLIMITED)
SETTINGS = ("workers", "methods", "hidden", "layers", "vocab", "seed", "steps", "seconds")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WARMUP_STEPS = 6  # optimizers compile, DDP rebuilds its buckets, PowerSGD begins to compress
TURNS = 3
BURST_BYTES = 72 * 1024
BURST_SECONDS = 0.5e-3
QUEUE_BYTES = 8 * 2**20  # of tbf: more than TCP has in flight here, so that nothing is dropped
PREFIX = "dlion"


def gpt2_shapes(hidden: int, layers: int, vocab: int, positions: int = 1024) -> list[tuple[int, ...]]:
    """The parameters of a GPT-2 with tied embeddings."""
    block = [(hidden,), (hidden,), (hidden, 3 * hidden), (3 * hidden,), (hidden, hidden), (hidden,)]
    block += [(hidden,), (hidden,), (hidden, 4 * hidden), (4 * hidden,), (4 * hidden, hidden), (hidden,)]
    return [(vocab, hidden), (positions, hidden), *(block * layers), (hidden,), (hidden,)]


def linear_model(shapes: list[tuple[int, ...]], seed: int) -> Any:
    """A module whose loss is linear in its parameters; the random gradients are of this seed."""
    import torch

    class Linear(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weights = torch.nn.ParameterList([0.02 * torch.randn(shape) for shape in shapes])
            source = torch.Generator().manual_seed(seed)
            self.gradients = [torch.randn(shape, generator=source).flatten() for shape in shapes]

        def forward(self) -> Any:
            pairs = zip(self.weights, self.gradients, strict=True)
            return torch.stack([weight.flatten().dot(gradient) for weight, gradient in pairs]).sum()

    return Linear()


class Contender:
    """One method in one worker: a copy of the model, a process group and an optimizer of its own."""

    def __init__(self, method: str, rank: int, options: argparse.Namespace) -> None:
        import torch
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        torch.manual_seed(options.seed)
        model = linear_model(gpt2_shapes(options.hidden, options.layers, options.vocab), options.seed + 1 + rank)
        group = torch.distributed.new_group()
        # PowerSGD starts rounds in callbacks. With several buckets, gloo lets those of one bucket pass those
        # of another on some ranks only, and the run breaks: so it gets all gradients in one.
        bucket_mb = 2**14 if method == "ddp_powersgd" else None
        # The view spares DDP a copy of the gradients each way: the baseline at its best.
        self.model = torch.nn.parallel.DistributedDataParallel(
            model, process_group=group, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb
        )
        self.interface: str | None = options.interface
        self.optimizer: torch.optim.Optimizer
        if method.startswith("dlion_"):
            from hf_dlion import DistributedLion, keep_gradients_local

            keep_gradients_local(self.model)
            self.optimizer = DistributedLion(
                model.parameters(), lr=1e-4, aggregation=method.removeprefix("dlion_"), process_group=group
            )
            return
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if method == "ddp_fp16":
            self.model.register_comm_hook(group, default_hooks.fp16_compress_hook)
        elif method == "ddp_powersgd":
            state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=4, start_powerSGD_iter=2)
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)

    def prepare(self) -> int:
        """Do all of a step that is not timed. Returns the number of parameters."""
        self.optimizer.zero_grad()
        self.loss = self.model()
        return sum(p.numel() for p in self.model.parameters())

    def step(self) -> float:
        """From the start of backward to updated parameters, in seconds."""
        start = time.perf_counter()
        self.loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start

    def sent(self) -> dict[str, int]:
        """Bytes sent so far, by the interface's count (of all methods) and by the ledger's (of this one)."""
        counts = {}
        if self.interface:
            counter = Path("/sys/class/net", self.interface, "statistics/tx_bytes")
            counts["interface"] = int(counter.read_text())
        if hasattr(self.optimizer, "ledger"):
            counts["ledger"] = int(self.optimizer.ledger.sent_bytes)
        return counts


def work(rank: int, channel: Connection) -> None:
    """Be a worker: do what the parent asks for until it hangs up."""
    import torch

    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    options: argparse.Namespace = channel.recv()
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{options.rendezvous}",
        rank=rank,
        world_size=options.workers,
        timeout=datetime.timedelta(seconds=options.timeout),
    )
    contenders = {method: Contender(method, rank, options) for method in options.methods}
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            method, request = channel.recv()
            channel.send(getattr(contenders[method], request)())


def end_with(parent: int) -> None:
    """End this worker when its parent was killed, also in the middle of a collective."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


class Workers:
    """The parent's side of the worker processes."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.channels: list[Connection] = []
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, prefixes: list[list[str]]) -> None:
        """Start a worker behind each of these commands."""
        interface = self.options.interface or ("lo" if sys.platform == "linux" else "lo0")
        environment = os.environ | {"GLOO_SOCKET_IFNAME": interface, "OMP_NUM_THREADS": "1"}
        for rank, prefix in enumerate(prefixes):
            channel, theirs = Pipe()
            fd = theirs.fileno()
            command = [*prefix, sys.executable, os.path.abspath(__file__), f"--worker={rank},{fd}"]
            # In a session of their own, Ctrl-C does not reach them: the parent ends them, and says so once.
            process = subprocess.Popen(command, pass_fds=[fd], env=environment, start_new_session=True)
            theirs.close()
            self.processes.append(process)
            self.channels.append(channel)
            channel.send(self.options)

    def close(self) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def ask(self, method: str, request: str) -> list[Any]:
        """Have each worker call this function of its `Contender`. Returns the answers by rank."""
        for channel in self.channels:
            with contextlib.suppress(OSError):  # a worker that has ended is noticed below
                channel.send((method, request))
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + self.options.timeout
        while missing := [rank for rank in range(len(self.channels)) if rank not in answers]:
            ready = wait([self.channels[rank] for rank in missing], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise BenchmarkError(
                    f"{method}: no answer to '{request}' from ranks {missing} in {self.options.timeout:g} s: "
                    "it hangs, or so slow a link needs a longer --timeout"
                )
            for rank in missing:
                if self.channels[rank] in ready:
                    try:
                        answers[rank] = self.channels[rank].recv()
                    except (EOFError, OSError):
                        raise BenchmarkError(
                            f"{method}: rank {rank} ended; its error, if it has one, is above"
                        ) from None
        return [answers[rank] for rank in range(len(self.channels))]

    def steps(self, method: str, number: int) -> list[float]:
        """Take some steps. Returns the seconds of each on its slowest worker."""
        seconds = []
        for _ in range(number):
            self.ask(method, "prepare")
            seconds.append(max(self.ask(method, "step")))
        return seconds

    def turn(self, result: dict[str, Any], number: int) -> None:
        """Measure some steps of a method, after one for its data and its connections to be warm again."""
        self.steps(result["method"], 1)
        before = self.ask(result["method"], "sent")
        result["step_seconds"] += self.steps(result["method"], number)
        for rank, after in enumerate(self.ask(result["method"], "sent")):
            for counter, count in after.items():
                by_rank = result.setdefault(f"{counter}_bytes_by_rank", [0] * len(before))
                by_rank[rank] += count - before[rank][counter]

    def measure(self, rate: str) -> list[dict[str, Any]]:
        """All methods at one rate, in turns. Each takes as many steps as its time allows."""
        methods: list[str] = self.options.methods
        share = {m: min(self.options.steps, self.options.seconds / self.steps(m, 2)[-1]) for m in methods}
        results: list[dict[str, Any]] = [{"rate": rate, "method": m, "step_seconds": []} for m in methods]
        for _ in range(TURNS):
            for result in results:
                self.turn(result, max(1, round(share[result["method"]] / TURNS)))
        for result in results:
            times = result["step_seconds"]
            result |= {"median": statistics.median(times), "min": min(times), "max": max(times)}
            say(f"{rate}: {result['method']}: {result['median']:.4f} s a step ({len(times)} steps)")
        return results


def call(*command: str) -> str:
    """Run `ip` or `tc`. Returns what it prints."""
    done = subprocess.run(command, capture_output=True, text=True, start_new_session=True)
    if done.returncode:
        raise BenchmarkError(
            f"`{shlex.join(command)}`: {done.stderr.strip()}. Namespaces need root with CAP_NET_ADMIN and "
            "CAP_SYS_ADMIN, and the kernel's veth, bridge and sch_tbf; --loopback measures without them"
        )
    return done.stdout


def remove_namespaces(of_run: str | None = None) -> None:
    """Remove the namespaces of one run, or of all runs whose process is gone."""
    for name in re.findall(rf"^{PREFIX}\d+-\w+", call("ip", "netns", "list"), re.MULTILINE):
        run = name.partition("-")[0]
        if run == of_run or not (of_run or Path("/proc", run.removeprefix(PREFIX)).exists()):
            with contextlib.suppress(BenchmarkError):
                call("ip", "netns", "delete", name)


@contextlib.contextmanager
def namespaces(workers: int) -> Iterator[list[str]]:
    """A namespace a worker, each with a link `eth0` to the bridge in one more, which is the last of them."""
    run = f"{PREFIX}{os.getpid()}"
    *names, hub = [f"{run}-{rank}" for rank in range(workers)] + [f"{run}-hub"]
    remove_namespaces()
    try:
        call("ip", "netns", "add", hub)
        call("ip", "-n", hub, "link", "add", "bridge", "up", "type", "bridge")
        for rank, name in enumerate(names):
            port = f"port{rank}"
            call("ip", "netns", "add", name)
            call(*f"ip -n {hub} link add {port} type veth peer name eth0 netns {name}".split())
            call("ip", "-n", hub, "link", "set", port, "master", "bridge", "up")
            with contextlib.suppress(BenchmarkError):  # IPv6, if there is any, would send on its own
                call("ip", "-n", name, "link", "set", "eth0", "addrgenmode", "none")
            call("ip", "-n", name, "address", "add", f"10.0.0.{rank + 1}/24", "dev", "eth0")
            call("ip", "-n", name, "link", "set", "eth0", "up")
        yield [*names, hub]
    finally:
        ignore_signals()
        remove_namespaces(run)


def limit(names: list[str], bits: float) -> None:
    """Limit both ends of each link to so many bits a second."""
    discipline = ["noqueue"]
    if bits < math.inf:
        burst = max(BURST_BYTES, round(bits / 8 * BURST_SECONDS))
        discipline = ["tbf", "rate", f"{bits:.0f}bit", "burst", f"{burst}", "limit", f"{QUEUE_BYTES}"]
    for rank, name in enumerate(names[:-1]):
        call("tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root", *discipline)
        call("tc", "-n", names[-1], "qdisc", "replace", "dev", f"port{rank}", "root", *discipline)


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
            workers.steps(method, WARMUP_STEPS)
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
        "command": shlex.join(["python", "examples/benchmark_network.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "network": f"loopback ({reason})" if reason else "namespaces, veth and a bridge, tbf at both ends",
        "settings": {name: getattr(options, name) for name in SETTINGS} | {"parameters": parameters},
        "results": results,
    }


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    facts: dict[str, Any] = {"cpu": platform.processor(), "cores": os.cpu_count()}
    with contextlib.suppress(OSError, IndexError):
        facts["cpu"] = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
        facts["tcp"] = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    facts |= {"system": platform.platform(), "python": platform.python_version()}
    for name in ("torch", "hf-dlion"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            facts[name] = importlib.metadata.version(name)
    return facts


def say(text: str) -> None:
    """Progress goes to stderr; stdout has the table alone."""
    print(text, file=sys.stderr, flush=True)


def ignore_signals() -> None:
    """Let nothing interrupt the cleaning up, with which this process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def on_signal(number: int, _: object) -> None:
    ignore_signals()
    raise KeyboardInterrupt(signal.Signals(number).name)


def parse() -> argparse.Namespace:
    """The command line."""
    about = (__doc__ or "").partition("\n")[0]
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=defaults, allow_abbrev=False)
    add = parser.add_argument
    add("--workers", type=int, default=4, help="how many, each a process of one thread")
    add("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="METHOD", help="to compare")
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
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.methods = list(dict.fromkeys(options.methods))
    if not 1 <= options.workers <= 250 or options.steps < 1 or options.hidden < 64 or options.hidden % 64:
        parser.error("--workers is 1 to 250, --steps at least 1, --hidden a multiple of 64")
    return options


def main() -> int:
    options = parse()
    if options.worker:
        rank, fd = map(int, options.worker.split(","))
        os.set_inheritable(fd, False)  # a compiler's process that outlives its worker must not hold it open
        work(rank, Connection(fd))
        return 0
    for number in SIGNALS:
        signal.signal(number, on_signal)
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
