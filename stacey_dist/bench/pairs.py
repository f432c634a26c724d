"""Measure one optimizer beside torch's fused AdamW, the peer, in a process that runs only these two.

The two take turns, and the order alternates from round to round. So other load on the machine and the state of the
caches affect both equally. A process gives the median of the ratios of its rounds.
"""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import Parameter

from stacey_dist.bench.rivals import PEER, rivals
from stacey_dist.optim.kernels import NoKernelError

PRELOADED = [__name__, "torch._dynamo"]
"""The modules that the fork server imports. They hold no optimizer's memory and start no threads. torch imports the
second one when an optimizer is created."""


@dataclass(frozen=True)
class Pair:
    """The measurements of one process: seconds of each round."""

    rival: list[float]
    peer: list[float]
    extra_bytes: int
    """Memory that the rival's step takes, at most, and gives back."""
    host: float | None
    """Seconds after which the rival's step returns to its caller: on a GPU that works on, how long the host is busy.

    None where it was not measured.
    """
    launches: int | None
    """Kernels that the rival's step starts on a GPU."""

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios."""
        return statistics.median(a / b for a, b in zip(self.rival, self.peer, strict=True))


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of a module in a process of its own; return what it returns."""
    # Where CUDA was started, as an import may do, a fork cannot use it.
    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *arguments).result()


def measure_pair(
    name: str, shapes: list[tuple[int, ...]], device: str, rounds: int, rival_is_first: bool
) -> Pair | None:
    """Let a rival and the peer take turns. None if the rival's package is not there, or doesn't run here."""
    torch.manual_seed(0)
    gradients = [torch.randn(shape, device=device) * 1e-3 for shape in shapes]

    def made(rival: str) -> Callable[[], object]:
        torch.manual_seed(1)
        params = [Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
        for param, gradient in zip(params, gradients, strict=True):
            param.grad = gradient
        return rivals(slow=True)[rival].make(params)

    try:
        steps = {"rival": made(name), "peer": made(PEER)}
    except (ImportError, RuntimeError) as error:
        if name.startswith("Stacey") and not isinstance(error.__cause__, NoKernelError):
            raise
        return None
    for step in steps.values():
        step()
        step()
    extra_bytes = _extra_bytes(steps["rival"], device)
    seconds: dict[str, list[float]] = {"rival": [], "peer": []}
    for number in range(rounds):
        order = ("rival", "peer") if (number % 2 == 0) == rival_is_first else ("peer", "rival")
        for one in order:
            seconds[one].append(_timed(steps[one], device))
    if device != "cuda":
        return Pair(seconds["rival"], seconds["peer"], extra_bytes, statistics.median(seconds["rival"]), None)
    host = statistics.median(_timed(steps["rival"], device, wait=False) for _ in range(rounds))
    return Pair(seconds["rival"], seconds["peer"], extra_bytes, host, _launches(steps["rival"]))


def measure_copy(count: int, device: str, rounds: int) -> float:
    """Return the median time of a copy of float32 elements."""
    copied, source = torch.zeros(count, device=device), torch.ones(count, device=device)
    copied.copy_(source)
    return statistics.median(_timed(lambda: copied.copy_(source), device) for _ in range(rounds))


def _timed(work: Callable[[], object], device: str, wait: bool = True) -> float:
    """Return the seconds of some work; with `wait`, until the device has finished it."""
    _finish(device)
    begin = time.perf_counter()
    work()
    if wait:
        _finish(device)
    return time.perf_counter() - begin


def _launches(work: Callable[[], object]) -> int:
    """Return how many kernels some work starts on the GPU, without copies and fills."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    on_gpu = [event for event in profiler.events() if event.device_type == torch.profiler.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_gpu)


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _extra_bytes(work: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the kernel records the peak anew
    before = _kilobytes("VmRSS")
    work()
    return (_kilobytes("VmHWM") - before) * 1024


def _kilobytes(field: str) -> int:
    """Return a figure of this process's memory; VmHWM is the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))
