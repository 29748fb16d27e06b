"""A worker of `network.py`: a process that takes steps by each method as its parent asks for them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from hf_dlion import (
    DistributedLion,
    DistributedMuon,
    LocalSteps,
    hidden_matrices,
    keep_gradients_local,
    vote_gradients,
)
from hf_dlion.plan import measured_bandwidth
from hf_dlion.wire.ledger import Ledger

from .network_report import ALONE, STREAMED
from .shapes import gpt2_shapes

VOTES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dlion_mavo": (DistributedLion, {}),
    "dlion_mavo_after": (DistributedLion, {"overlap": False}),
    "dlion_mavo_alternate": (DistributedLion, {"tie": "alternate"}),
    "dlion_avg": (DistributedLion, {"aggregation": "avg"}),
    "dmuon_mavo": (DistributedMuon, {}),
    "dmuon_three_steps": (DistributedMuon, {"ns_steps": 3}),
    "dmuon_averages": (DistributedMuon, {"rest": "average"}),
    "dmuon_avg": (DistributedMuon, {"aggregation": "avg"}),
}
"""Optimizers whose workers vote, by method: what is made with which options."""


def linear_model(shapes: list[tuple[int, ...]], seed: int) -> torch.nn.Module:
    """A module whose loss is linear in its parameters; the random gradients are of this seed."""

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


def language_model(options: argparse.Namespace, seed: int) -> torch.nn.Module:
    """A module whose forward is a GPT-2's loss on random tokens, others each time; of this seed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": options.hidden, "n_layer": options.layers, "n_head": options.hidden // 64}
    config = GPT2Config(vocab_size=options.vocab, use_cache=False, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0, **sizes)

    class Trained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2LMHeadModel(config)
            self.source = torch.Generator().manual_seed(seed)

        def forward(self) -> Any:
            tokens = torch.randint(options.vocab, (-(-options.tokens // 128), 128), generator=self.source)
            return self.model(input_ids=tokens, labels=tokens).loss

    return Trained()


class Contender:
    """One method in one worker: a copy of the model, a process group and an optimizer of its own."""

    def __init__(self, method: str, rank: int, options: argparse.Namespace) -> None:
        torch.manual_seed(options.seed)
        self.whole = options.tokens > 0
        if self.whole:
            model = language_model(options, options.seed + 1 + rank)
        else:
            model = linear_model(gpt2_shapes(options.hidden, options.layers, options.vocab), options.seed + 1 + rank)
        self.interface: str | None = options.interface
        self.ledger: Ledger | None = None
        self.optimizer: torch.optim.Optimizer
        local = method.startswith("local_")
        self.round = int(method.removeprefix("local_").removesuffix(STREAMED)) if local else 1
        if method == ALONE:
            self.model = model
            self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
            return
        group = torch.distributed.new_group()
        # PowerSGD starts rounds in callbacks. With several buckets, gloo lets those of one bucket pass those
        # of another on some ranks only, and the run breaks: so it gets all gradients in one.
        bucket_mb = 2**14 if method == "ddp_powersgd" else None
        # The view spares DDP a copy of the gradients each way: the baseline at its best.
        self.model = ddp = torch.nn.parallel.DistributedDataParallel(
            model, process_group=group, gradient_as_bucket_view=True, bucket_cap_mb=bucket_mb
        )
        if method in VOTES:
            keep_gradients_local(self.model)
            kind, special = VOTES[method]
            parameters = hidden_matrices(model) if kind is DistributedMuon else model.parameters()
            self.optimizer = kind(parameters, lr=1e-4, process_group=group, **special)
            return
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if local:
            keep_gradients_local(self.model)
            fragments, delay = (4, 2) if method.endswith(STREAMED) else (1, 0)
            self.optimizer = LocalSteps(
                self.optimizer, every=self.round, fragments=fragments, delay=delay, process_group=group
            )
        self.ledger = send_gradients(ddp, method, group)

    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        return measured_bandwidth()

    def prepare(self) -> int:
        """Do all of a step that is not timed. Returns the number of parameters."""
        self.optimizer.zero_grad()
        if not self.whole:
            self.loss = self.model()
        return sum(p.numel() for p in self.model.parameters())

    def step(self) -> float:
        """From the start of backward, or of a whole step, to updated parameters, in seconds; of a round on average."""
        start = time.perf_counter()
        for left in range(self.round, 0, -1):
            if self.whole:
                self.loss = self.model()
            self.loss.backward(retain_graph=left > 1 and not self.whole)
            self.optimizer.step()
            if left > 1:
                self.optimizer.zero_grad()
        return (time.perf_counter() - start) / self.round

    def sent(self) -> dict[str, float]:
        """Bytes sent so far, by the interface's count (of all methods) and by the ledger's (of this one).

        With local steps, those of a round count as its average, as its seconds do.
        """
        counts: dict[str, float] = {}
        if self.interface:
            counter = Path("/sys/class/net", self.interface, "statistics/tx_bytes")
            counts["interface"] = int(counter.read_text()) / self.round
        ledger = getattr(self.optimizer, "ledger", self.ledger)
        if ledger is not None:
            counts["ledger"] = ledger.sent_bytes / self.round
        return counts


def send_gradients(ddp: Any, method: str, group: torch.distributed.ProcessGroup) -> Ledger | None:
    """By a hook of DDP in place of its averages in float32, if that is the method. Returns the ledger of votes."""
    if method == "gradient_votes":
        votes = vote_gradients(ddp)
        return None if votes is None else votes.ledger
    if method == "ddp_fp16":
        ddp.register_comm_hook(group, default_hooks.fp16_compress_hook)
    elif method == "ddp_powersgd":
        state = powerSGD_hook.PowerSGDState(group, matrix_approximation_rank=4, start_powerSGD_iter=2)
        ddp.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    return None


def work(rank: int, channel: Connection) -> None:
    """Be a worker: do what the parent asks for until it hangs up."""
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


if __name__ == "__main__":
    rank, descriptor = map(int, sys.argv[1:])
    os.set_inheritable(descriptor, False)  # a compiler's process that outlives its worker must not hold it open
    work(rank, Connection(descriptor))
