"""torch.set_default_dtype is the model's, not the optimizer's: what is computed in float32 stays in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_dlion import DistributedLion, DistributedMuon
from hf_dlion.optim import bad_gradients, signed_gradients
from hf_dlion.optim.dgc import DeepGradientCompression
from hf_dlion.optim.gadamw import GlobalAdamW
from hf_dlion.optim.gmuon import GlobalMuon
from hf_dlion.optim.graddrop import GradDrop
from hf_dlion.optim.signed_gradients import VirtualGradients
from hf_dlion.optim.terngrad import TernGrad
from hf_dlion.optim.virtual import VirtualWorkers
from tests.kernels import use_kernels

SHAPES = [(40, 1000), (300,), (7,)]
CASES: list[tuple[Any, dict[str, Any]]] = [
    (DistributedLion, {"aggregation": "avg", "norm_gradients": True}),
    (DistributedMuon, {"tie": "zero"}),
    (DistributedMuon, {"rest": "average"}),
    (GlobalAdamW, {}),
    (GlobalMuon, {}),
    (TernGrad, {}),
    (GradDrop, {}),
    (DeepGradientCompression, {}),
    (VirtualGradients, {}),
    (VirtualGradients, {"dither": False}),
]


@pytest.fixture(autouse=True)
def back(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("optim.dlion.make_kernels", "optim.dlion.can_launch", "wire.exchange.can_launch"):
        monkeypatch.setattr(f"hf_dlion.{name}", None)  # put back after use_kernels
    for module in (bad_gradients, signed_gradients):
        monkeypatch.setattr(module, "NATIVE_FROM", module.NATIVE_FROM)
    yield
    torch.set_default_dtype(torch.float32)


def trained(method: Any, options: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Parameters, or gradients that were voted on, after three steps of three workers."""
    torch.set_default_dtype(dtype)
    params = [nn.Parameter(torch.ones(shape, dtype=torch.float32)) for shape in SHAPES]
    hidden = issubclass(method, (DistributedMuon, GlobalMuon))
    matrices = {"params": params[:1], "orthogonal": True, "split": ()}
    groups: Any = [matrices, {"params": params[1:]}] if hidden else params
    votes = method is VirtualGradients
    optimizer: Any = (
        method(iter([(str(i), p) for i, p in enumerate(params)]), 3, **options)
        if votes
        else VirtualWorkers(groups, 3, method, lr=1e-2, **options)
    )
    for step in range(3):
        for rank in range(3):
            source = torch.Generator().manual_seed(10 * step + rank)
            for parameter in params:
                parameter.grad = torch.randn(parameter.shape, generator=source, dtype=torch.float32)
            optimizer.take_turn(rank) if votes else optimizer.next_worker()
        optimizer.decide() if votes else optimizer.step()
    return [parameter.grad if votes else parameter.detach() for parameter in params]


@pytest.mark.parametrize("kernels", ["eager", "native"])
@pytest.mark.parametrize(("method", "options"), CASES)
def test_it_changes_nothing(method: Any, options: dict[str, Any], kernels: str) -> None:
    use_kernels(kernels)
    plain, half, double = (trained(method, options, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64))
    for index, tensors in enumerate(zip(plain, half, double, strict=True)):
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert torch.equal(tensors[0], tensors[1]), index
        assert torch.equal(tensors[0], tensors[2]), index
