"""Waiting for processes that are not this one's children."""

import time
from collections.abc import Iterable

import psutil


def still_running(processes: Iterable[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait until the processes have ended, and return those that still run after some seconds.

    A zombie has ended: orphans stay zombies where nobody waits for them, as in a container without an init process.
    """
    deadline = time.monotonic() + seconds
    running = list(processes)
    while running := [process for process in running if _runs(process)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    return running


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
