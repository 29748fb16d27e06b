"""Settings that libraries read when they are imported: nothing is asked of the hub, and tests run side by side."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RUST_LOG", "error")  # torchft's, which are written past pytest
