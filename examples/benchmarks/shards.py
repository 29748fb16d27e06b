"""What a rank of sharded replicas holds, what a step adds, and what it sends. Two replicas of two shards over loopback.

    python -m examples.benchmarks.shards --output model_cards/shards

One hundred million parameters, of which four matrices of 768 x 3072 are orthogonalised by dmuon. Tensors are counted;
what a step adds is read from the resident set at its peak (Linux only). Writes `results.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from hf_dlion import DistributedLion, DistributedMuon

from .machine import machine
from .step import kibibytes

REPLICAS, SHARDS = 2, 2
HIDDEN = [(768, 3072)] * 4


class Parameters(nn.Module):
    """Nothing but parameters: the hidden matrices, and one that has what is left of the number."""

    def __init__(self, count: int) -> None:
        super().__init__()
        rest = (count - sum(rows * columns for rows, columns in HIDDEN)) // 1000
        self.all = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in [(rest, 1000), *HIDDEN]])


def mebibytes(tensors: list[Any]) -> float:
    return sum(tensor.to_local().nbytes if isinstance(tensor, DTensor) else tensor.nbytes for tensor in tensors) / 2**20


def measure(method: str, aggregation: str, count: int, mesh: DeviceMesh) -> dict[str, Any]:
    model = Parameters(count)
    fully_shard(model, mesh=mesh["dp_shard"])
    rest, *hidden = params = list(model.parameters())
    group = mesh["dp_replicate"].get_group()
    optimizer: DistributedLion
    if method == "dmuon":
        groups = [{"params": [rest]}, {"params": hidden, "orthogonal": True}]
        optimizer = DistributedMuon(groups, aggregation=aggregation, process_group=group)
    else:
        optimizer = DistributedLion(params, aggregation=aggregation, process_group=group)
    for parameter in params:
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().normal_()  # type: ignore[attr-defined]
    optimizer.step()
    before = optimizer.ledger.copy()
    Path("/proc/self/clear_refs").write_text("5")
    resident = kibibytes(Path("/proc/self/status"), "VmRSS")
    optimizer.step()
    peak = (kibibytes(Path("/proc/self/status"), "VmHWM") - resident) / 1024
    return {
        "parameters_mebibytes": mebibytes(params),
        "gradients_mebibytes": mebibytes([parameter.grad for parameter in params]),
        "momentum_mebibytes": mebibytes([state["momentum"] for state in optimizer.state.values()]),
        "step_adds_mebibytes": peak,
        "bits_sent_per_parameter": 8 * optimizer.ledger.since(before).sent_bytes / count,
    }


def work(rank: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank // SHARDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=REPLICAS * SHARDS)
    mesh = init_device_mesh("cpu", (REPLICAS, SHARDS), mesh_dim_names=("dp_replicate", "dp_shard"))
    cases = [(method, aggregation) for method in ("dlion", "dmuon") for aggregation in ("mavo", "avg")]
    found = {f"{one}_{aggregation}": measure(one, aggregation, count, mesh) for one, aggregation in cases}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--parameters", type=int, default=100_000_000, help="of the model (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("shards"), help="folder for results.json (default: shards)")
    options = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if platform.system() == "Linux" else "lo0")
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (folder, options.parameters), nprocs=REPLICAS * SHARDS)
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(REPLICAS * SHARDS)]
    command = f"python -m examples.benchmarks.shards --parameters {options.parameters}"
    report = {"command": command, "machine": machine(), "replicas": REPLICAS, "shards": SHARDS, "ranks": ranks}
    options.output.mkdir(parents=True, exist_ok=True)
    Path(options.output, "results.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, found in ranks[0].items():
        print(f"{name}: {', '.join(f'{key} {value:.2f}' for key, value in found.items())}")


if __name__ == "__main__":
    main()
