"""These tests need a GPU, and are skipped without one. One is enough: worker processes share it, joined by gloo."""

import pytest
import torch

from tests.gpu.device import DEVICE


@pytest.fixture(autouse=True)
def _needs_the_device() -> None:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch finds none")
