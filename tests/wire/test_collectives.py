"""What only whole processes show: their exit. Without ``drain_gloo``, one run in three fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VOTE_AND_EXIT = """
import sys
import torch
import torch.distributed as dist
from hf_dlion.wire.collectives import ProcessChannel
from hf_dlion.wire.ledger import Ledger

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=4)
channel = ProcessChannel(None, Ledger())
for step in range(3):
    votes, work = channel.all_gather(torch.arange(4))
    work.wait()
    del votes, work
"""


def test_a_process_may_exit_right_after_a_collective(tmp_path: Path) -> None:
    meeting = f"file://{tmp_path}/meeting"
    workers = [
        subprocess.Popen([sys.executable, "-c", VOTE_AND_EXIT, meeting, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    errors = [worker.communicate(timeout=100)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, errors
