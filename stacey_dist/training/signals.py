"""SIGTERM and Ctrl-C: finish the step, save, and leave so that a scheduler can start the run again."""

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# A person who presses Ctrl-C again has read the first answer; a launcher that forwards the same Ctrl-C is faster.
_SAME_CTRL_C_SECONDS = 1.0


_entered: "StopSignal | None" = None


def stop_requested() -> bool:
    """Return whether this process was told to stop, while a `StopSignal` is entered."""
    return _entered is not None and _entered.received is not None


class StopSignal:
    """While entered, remembers the first SIGTERM or SIGINT in `received`.

    SIGTERM may come again while the checkpoint is written: Slurm sends it to every process, and torchrun's agent
    passes its own on. So only a second Ctrl-C, from a person, stops at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        global _entered
        _entered = self
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        global _entered
        _entered = None
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = number, now
            line = f"\n{signal.Signals(number).name}: finishing this step, then saving (Ctrl-C again: stop at once)\n"
            with contextlib.suppress(OSError):
                # Not print: it raises where the signal came in the middle of another one, as when a pipe is full.
                os.write(1, line.encode())
        elif number == signal.SIGINT and now - self._received_at > _SAME_CTRL_C_SECONDS:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
