"""A loop whose workers come and go, without a restart of the others. It needs torchft: pip install '.[elastic]'.

    torchft_lighthouse --min_replicas 1
    python examples/elastic_loop.py --lighthouse http://localhost:29510

The second line is one worker: run it in a few terminals. End one with Ctrl-C, and start another: it goes on where the
others are. A small network learns the parity of four bits; nothing is downloaded.
"""

import argparse
import itertools
import socket
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
from torchft import Manager
from torchft.process_group import ProcessGroupGloo

from hf_dlion.integrations.torchft import ElasticLocalSteps

STEPS = 1200


def parity() -> TensorDataset:
    """All rows of four bits, 32 times, with their parity."""
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).repeat(32, 1)
    return TensorDataset(rows, rows.sum(dim=1).long() % 2)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--lighthouse", required=True, metavar="URL", help="of torchft_lighthouse, where workers meet")
    parser.add_argument(
        "--pause",
        type=float,
        default=0.05,
        metavar="SECONDS",
        help="after each step, as of a larger model: %(default)s",
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    host = socket.gethostname()  # by which the other workers reach this one
    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    group = ProcessGroupGloo(timeout=timedelta(seconds=30))  # longer than sending the state takes
    manager = Manager(
        group,
        None,
        None,
        min_replica_size=1,
        use_async_quorum=False,
        max_retries=10,  # of a vote; else for ever
        timeout=timedelta(seconds=60),
        quorum_timeout=timedelta(minutes=10),  # longer than the steps between two votes take
        rank=0,
        world_size=1,
        store_addr=host,
        store_port=store.port,
        lighthouse_addr=options.lighthouse,
    )

    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    optimizer = ElasticLocalSteps(inner, manager, group, every=16)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
    manager.register_state_dict_fn("scheduler", scheduler.load_state_dict, scheduler.state_dict)
    if optimizer.join():  # the others are at the end of a step
        scheduler.step()

    loader = DataLoader(parity(), batch_size=32, shuffle=True)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    while (step := optimizer.param_groups[0]["step"]) < STEPS:  # counted there: who was cut off jumps to the others'
        rows, labels = next(batches)
        loss = torch.nn.functional.cross_entropy(model(rows), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        time.sleep(options.pause)
        if (step + 1) % 80 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}, {optimizer.workers} workers", flush=True)
    optimizer.vote()
    manager.shutdown()


if __name__ == "__main__":
    main()
