"""What the soak trains: examples/pretrain_gpt2.py, with records, and with faults that it can be told to have.

SIGUSR1: this process dies inside of its next exchange, SIGUSR2: while it next writes a checkpoint.
"""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

import pretrain_gpt2
from hf_dlion import DLionTrainer
from hf_dlion.bits.hashing import checksum
from hf_dlion.checkpoint import complete, workers
from hf_dlion.checkpoint.manifest import write_whole
from hf_dlion.wire import groups
from hf_dlion.wire.collectives import Pending, ProcessChannel
from tests.faults.test_soak import LAST_STEP, PROGRESS, RECORDS

told: set[int] = set()


def die_if(number: int) -> None:
    if number in told:
        os.kill(os.getpid(), signal.SIGKILL)


class Channel(ProcessChannel):
    def _all_gather(self, parts: Tensor, part: Tensor) -> Pending:
        work = super()._all_gather(parts, part)
        die_if(signal.SIGUSR1)
        return work


def write_or_die(path: Path, write: Any) -> None:
    def half(part: Path) -> None:
        write(part)
        if signal.SIGUSR2 in told:
            part.write_bytes(part.read_bytes()[: part.stat().st_size // 2])
            die_if(signal.SIGUSR2)

    write_whole(path, half)


class ShowProgress(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        last = Path(args.output_dir, LAST_STEP)
        if last.exists():
            state.max_steps = int(last.read_text())

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.process_index == 0:
            Path(args.output_dir, PROGRESS).write_text(f"{state.global_step} {time.time()}")


class RecordingTrainer(DLionTrainer):
    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.add_callback(ShowProgress())
        why = complete.why_incomplete(resume_from_checkpoint) if resume_from_checkpoint else None
        self._record(began=time.time(), resumed_from=resume_from_checkpoint, incomplete=why)
        output = super().train(resume_from_checkpoint, *args, **kwargs)
        parameters = [parameter.detach() for parameter in self.model.parameters()]
        self._record(ended=time.time(), checksum=checksum(parameters), step=self.state.global_step)
        return output

    def _record(self, **entry: Any) -> None:
        with Path(self.args.output_dir, RECORDS.format(self.args.process_index)).open("a") as file:
            file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: told.add(number))
    groups.ProcessChannel = Channel  # type: ignore[misc]
    workers.write_whole = write_or_die  # type: ignore[assignment]
    pretrain_gpt2.DLionTrainer = RecordingTrainer  # type: ignore[misc]
    pretrain_gpt2.main()
