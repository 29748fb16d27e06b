"""Which implementation of the passes over parameters an optimizer takes, whatever the size of the model."""

from __future__ import annotations

from typing import Any

from hf_dlion.bits.kernels import Kernels
from hf_dlion.bits.native import load_passes
from hf_dlion.optim import bad_gradients, dlion, signed_gradients
from hf_dlion.wire import exchange

KINDS = ("eager", "native", "launched")


def use_kernels(kind: str) -> None:
    """From now on, in this process: eager ones, those in C, or Triton's, which need a GPU or its interpreter."""

    def chosen(*_: Any) -> Kernels | None:
        if kind != "native":
            return None
        found = load_passes()
        assert found is not None
        return found

    dlion.make_kernels = chosen
    bad_gradients.NATIVE_FROM = signed_gradients.NATIVE_FROM = 0 if kind == "native" else 1 << 62
    for module in (dlion, exchange, bad_gradients, signed_gradients):
        module.can_launch = lambda device: kind == "launched"
