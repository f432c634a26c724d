"""The device of this process: its name, its CPU cores and its memory in use."""

import os
import resource
import sys

import torch

from stacey_dist.cores import available_cores


def cores_per_process() -> int:
    """Return this process's share of the machine's cores."""
    return max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def cpu_threads() -> int:
    """Return the threads of a process that trains on the CPU: OMP_NUM_THREADS, or its share of the cores.

    Launchers set OMP_NUM_THREADS too: to 1, which would leave the other cores idle, or to all of a machine's cores,
    of which this process may have a part.
    """
    asked, share = os.environ.get("OMP_NUM_THREADS", ""), cores_per_process()
    by_launcher = not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}.isdisjoint(os.environ)
    if not asked.isdecimal() or int(asked) < (2 if by_launcher else 1):
        return share
    return min(int(asked), share) if by_launcher else int(asked)


def device_name(device: torch.device) -> str:
    """Return the device as a person knows it: a GPU's model, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device.type} ({threads} thread{'s' if threads > 1 else ''})"


def memory_in_use(device: torch.device) -> int:
    """Return the peak bytes of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
