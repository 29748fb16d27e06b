"""Compile Triton's kernels, as they are launched in training, to the machine code of GPUs that are not there.

python -m tests.optim.compiled 70 80 90     # compute capabilities
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from hf_dlion.bits import counting, gpu
from tests.optim.launched import CASES, train

KERNELS = {name for name, value in vars(gpu).items() if isinstance(value, triton.JITFunction)}
FUNCTIONS = {"_rows_and_lanes", "_from", "_mixed", "_scatter", "_store", "_inside", "_mean", "_levels", "_first_part"}
FUNCTIONS |= {"_chunk", "_add"}
"""Those that kernels call."""


INEXACT = ("fma.", "mad.rn.", "div.full.", "div.approx.", "rcp.")
"""How instructions begin that round otherwise, in PTX."""


class Driver:
    """As far as a compilation asks one."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # a GPU of each

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_all(capability: int) -> None:
    triton.runtime.driver.set_active(Driver(capability))
    compiled = set()

    def compile_only(kernel: Any, programs: int, *given: Any, warps: int = gpu._WARPS) -> None:
        made = kernel.warmup(*given, grid=(programs,), num_warps=warps, enable_fp_fusion=False)
        code = made.asm["ptx"]
        # What the eager passes round twice is rounded twice, and no number is too small; of what is divided, none is.
        assert made.asm["cubin"]
        words = set(code.replace("div.rn.ftz.", "div.rn.").split())
        inexact = {word for word in words if word.startswith(INEXACT) or ".ftz" in word}
        assert not inexact, (kernel, inexact)
        compiled.add(kernel.__name__)

    gpu._launch = compile_only
    old = capability < 80  # which has no bfloat16: the optimizer steps such parameters eagerly there
    if not old:
        gpu.try_out(torch.device("cpu"))
    for method, workers, (dtype, *rules) in itertools.product(("dlion", "dmuon"), (1, 2, 3), CASES):
        if not old or dtype != torch.bfloat16:
            train("launched", method, workers, dtype, *rules)
    votes = [torch.zeros(64, dtype=torch.int32) for _ in range(16)]
    for voters, rule in itertools.product((1, 2, 3, 16), counting.RULES):
        gpu.tally(votes[:voters], rule, 1, range(64))
    for dtype, highest in itertools.product(gpu.TYPES, (1, 2, 3)):
        if not old or dtype != torch.bfloat16:
            bucket, parts, widths = torch.zeros(2048, dtype=dtype), [2000, 48], torch.ones(2)
            gpu.settle(bucket, parts, widths, highest, votes[: highest.bit_length()])
            gpu.pack_dithered(bucket, parts, [1, 2], widths if highest == 1 else None, 0)
    assert compiled == KERNELS - FUNCTIONS


if __name__ == "__main__":
    for capability in sys.argv[1:]:
        compile_all(int(capability))
