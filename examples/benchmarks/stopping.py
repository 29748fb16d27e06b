"""A signal ends a benchmark once, and then nothing interrupts its cleaning up."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def stop_on_signals() -> None:
    """From now on each of them raises KeyboardInterrupt with its name."""
    for number in SIGNALS:
        signal.signal(number, _on_signal)


def ignore_signals() -> None:
    """Let nothing interrupt the cleaning up, with which this process ends."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _on_signal(number: int, _: object) -> None:
    ignore_signals()
    raise KeyboardInterrupt(signal.Signals(number).name)
