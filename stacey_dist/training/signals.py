"""SIGTERM and Ctrl-C: finish the step, save, and leave so that a scheduler can start the run again."""

import signal
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """While entered, remembers the first SIGTERM or SIGINT in `received`; a second one acts at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            print(
                f"\n{signal.Signals(number).name}: finishing this step, then saving (again: stop at once)",
                flush=True,
            )
        else:
            for restored, handler in self._before.items():
                signal.signal(restored, handler)
            signal.raise_signal(number)
