"""Count the cores of the machine that this process may use."""

import os


def available_cores() -> int:
    """Return the number of cores that this process may run on, where the system says which; else all of them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
