"""Lightning with Distributed Lion: a callback keeps gradients on their worker, and the module makes the optimizer.

    python examples/hosts/lightning_fit.py

A small network learns the parity of four bits, in two processes on a CPU. Run with Lightning 2.6.
"""

import itertools
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_dlion import DistributedLion, keep_gradients_local


class LocalGradients(lightning.Callback):
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        keep_gradients_local(trainer.strategy.model)  # the module in DistributedDataParallel


class Parity(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch: Any, index: int) -> Tensor:
        rows, labels = batch
        return nn.functional.cross_entropy(self.layers(rows), labels)

    def configure_optimizers(self) -> DistributedLion:
        return DistributedLion(self.parameters(), lr=3e-3, weight_decay=0.01)


def main() -> None:
    lightning.seed_everything(0)
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=4))).repeat(32, 1)
    labels = rows.sum(dim=1).long() % 2
    loader = DataLoader(TensorDataset(rows, labels), batch_size=32, shuffle=True)
    trainer = lightning.Trainer(
        accelerator="cpu",  # "gpu", with as many devices as there are GPUs
        devices=2,
        strategy="ddp",
        max_epochs=20,
        callbacks=[LocalGradients()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Parity()
    trainer.fit(module, loader)
    if trainer.is_global_zero:
        right = (module.layers(rows).argmax(dim=1) == labels).float().mean()
        ledger = trainer.optimizers[0].ledger
        print(f"{right:.0%} of the rows right; {ledger.sent_bytes} bytes sent in {ledger.steps} steps")


if __name__ == "__main__":
    main()
