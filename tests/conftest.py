"""Settings that libraries read when they are imported: nothing is asked of the hub, and tests run side by side."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RUST_LOG", "error")  # torchft's, which are written past pytest


def pytest_collection_finish() -> None:
    """All is imported by now: a Trainer, which collects garbage after each training, need not search it."""
    gc.freeze()
