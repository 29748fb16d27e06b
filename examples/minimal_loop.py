"""A plain Accelerate loop with Distributed Lion: two lines are not those of every such loop.

    accelerate launch --config_file examples/launch/cpu_2.yaml examples/minimal_loop.py

A small network learns the parity of four bits. Two processes on the CPU take seconds, and download nothing.
"""

import itertools

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from hf_dlion import DistributedLion, keep_gradients_local


def parity() -> TensorDataset:
    """All rows of four bits, 32 times, with their parity."""
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).repeat(32, 1)
    return TensorDataset(rows, rows.sum(dim=1).long() % 2)


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    loader = DataLoader(parity(), batch_size=32, shuffle=True)

    accelerator = Accelerator(cpu=True)
    keep_gradients_local(accelerator)  # before prepare
    optimizer = DistributedLion(model.parameters(), lr=3e-3, weight_decay=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    for epoch in range(1, 21):
        right = 0
        for rows, labels in loader:
            logits = model(rows)
            accelerator.backward(torch.nn.functional.cross_entropy(logits, labels))
            optimizer.step()
            optimizer.zero_grad()
            right += int((logits.argmax(dim=1) == labels).sum())
        if epoch % 5 == 0:
            share = accelerator.reduce(torch.tensor(float(right))).item() / len(loader.dataset)
            accelerator.print(f"epoch {epoch}: {share:.0%} of the training rows right")
    accelerator.end_training()


if __name__ == "__main__":
    main()
