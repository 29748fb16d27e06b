"""One worker of a run that others join and leave; what it does is said by its arguments, as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from hf_dlion.optim import mean_gradient

EVERY = 4
BUCKET = 1024  # elements, so that a vote has several
OPTIONS = {"every": EVERY, "outer_lr": 0.7, "outer_momentum": 0.5}


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 30))


def inner(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


def loss_of(model: nn.Module, worker: int, step: int) -> torch.Tensor:
    """Of what a worker sees at a step."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    rows = torch.randn(16, 40, generator=generator)
    return (model(rows) - rows[:, :30].sin()).square().mean()


def wait_for(there: Callable[[], bool]) -> None:
    until = time.monotonic() + 100
    while not there():
        assert time.monotonic() < until
        time.sleep(0.05)


def manager_of(worker: int, group: Any) -> Any:
    from torchft import Manager

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    patience = timedelta(seconds=60)
    made = Manager(
        group,
        None,
        None,
        min_replica_size=1,
        use_async_quorum=False,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        replica_id=f"worker_{worker}",
        hostname="127.0.0.1",
        timeout=patience,
        quorum_timeout=patience,
        connect_timeout=patience,
    )
    made.store_of_test = store  # it ends with its last reference
    return made


def die_in_a_vote(step: int, optimizer: Any) -> None:
    """Be killed in the vote after so many steps, before the last bucket of it."""
    from hf_dlion.integrations.torchft import QuorumChannel

    whole, sent = QuorumChannel._all_to_all, []

    def dying(self: Any, *tensors: torch.Tensor) -> Any:
        if optimizer.param_groups[0]["step"] == step:
            sent.append(tensors)
        if len(sent) == 4:
            time.sleep(1)  # the others apply what is decided
            os._exit(9)
        return whole(self, *tensors)

    QuorumChannel._all_to_all = dying  # type: ignore[method-assign]


def train(worker: int, folder: Path, steps: int, awaits: dict[str, list[str]], dies_in: int, dies_after: int) -> None:
    """Leaves, for each vote, the step, the number of workers and the parameters after it.

    Args:
        worker: its number, of which its data are.
        folder: for what it leaves.
        steps: of the run.
        awaits: files that it waits for, by the step before which it does; "" is before it is there.
        dies_in: the step in whose vote it is killed; -1: none.
        dies_after: the step after which it is killed.
    """
    from torchft.process_group import ProcessGroupGloo

    from hf_dlion.integrations.torchft import ElasticLocalSteps

    mean_gradient.BUCKET = BUCKET

    def wait(when: str) -> None:
        for name in awaits.get(when, []):
            wait_for((folder / name).exists)

    torch.set_num_threads(1)
    wait("")
    group = ProcessGroupGloo(timeout=timedelta(seconds=60))
    manager = manager_of(worker, group)
    model = small_model(worker)  # they begin with one's, whoever is the first
    optimizer = ElasticLocalSteps(inner(model.parameters()), manager, group, exchange="sharded", **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    manager.register_state_dict_fn("scheduler", scheduler.load_state_dict, scheduler.state_dict)
    die_in_a_vote(dies_in, optimizer)
    (folder / f"there_{worker}").touch()
    wait("0")
    if optimizer.join():
        scheduler.step()
    votes = [(optimizer.param_groups[0]["step"], optimizer.workers, [p.detach().clone() for p in model.parameters()])]
    while (made := optimizer.param_groups[0]["step"]) < steps:
        if made == dies_after:
            os._exit(9)
        if made:
            wait(str(made))
        optimizer.zero_grad()
        loss_of(model, worker, made).backward()
        optimizer.step()
        scheduler.step()
        if not optimizer.between_votes:
            votes.append((made + 1, optimizer.workers, [p.detach().clone() for p in model.parameters()]))
            torch.save(votes, folder / f"votes_{worker}.tmp")
            os.replace(folder / f"votes_{worker}.tmp", folder / f"votes_{worker}.pt")
            (folder / f"at_{made + 1}").touch()
    manager.shutdown()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    train(folder=Path(given.pop("folder")), **given)
