"""The one place where traffic is counted."""

from __future__ import annotations

import threading
from dataclasses import dataclass

_counting = threading.Lock()  # votes that leave during backward are counted in a thread of their own


@dataclass
class Ledger:
    """Payload bytes that this rank has sent to and received from the other ranks.

    A rank's own part, which a collective only copies, does not count. TCP and Ethernet headers are not in it.
    """

    sent_bytes: int = 0
    received_bytes: int = 0
    steps: int = 0

    def record(self, sent: int, received: int) -> None:
        """Add one collective."""
        with _counting:
            self.sent_bytes += sent
            self.received_bytes += received

    def since(self, earlier: Ledger) -> Ledger:
        """What was added after ``earlier``, a :meth:`copy` of this ledger."""
        return Ledger(
            self.sent_bytes - earlier.sent_bytes,
            self.received_bytes - earlier.received_bytes,
            self.steps - earlier.steps,
        )

    def copy(self) -> Ledger:
        """The counts as they are now."""
        return Ledger(self.sent_bytes, self.received_bytes, self.steps)


def fp32_all_reduce_bytes(parameters: int, workers: int) -> float:
    """Bytes that a rank sends in a bandwidth-optimal fp32 all-reduce: 2 (N-1)/N * 4 bytes a parameter."""
    return 2 * (workers - 1) / workers * 4 * parameters
