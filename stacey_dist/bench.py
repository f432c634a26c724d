"""Measure what a step of the optimizers costs on this machine: `stacey-dist bench`.

It is installed, unlike benchmarks/, since users compare the optimizers on machines of their own.

Each optimizer is measured against torch's fused AdamW, the peer, in processes that run only these two. The two take
turns, and the order alternates from round to round. So other load on the machine and the state of the caches affect
both equally. A process gives the median of the ratios of its rounds. The table has the median over the processes, with
the lowest and the highest.

Bytes are the least that a step must move: weights, gradients and states, read or written.
"""

import argparse
import importlib
import math
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from stacey_dist.errors import SettingsError
from stacey_dist.optim import Stacey
from stacey_dist.optim.kernels import NoKernelError
from stacey_dist.optim.rounding import STATES, Store, round_key
from stacey_dist.optim.rule import stacey_update

PEER = "torch AdamW, fused"
SETTINGS = dict(lr=1e-2, alpha=1e-2, tau=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
VARIANTS = (("p2", 2.8), ("p2", 3.0), ("pp", 2.8), ("2p", 2.8), ("p2", 30.0), ("pp", 30.0))


PRELOADED = [__name__, "torch._dynamo"]
"""The modules that the fork server imports. They hold no optimizer's memory and start no threads. torch imports the
second one when an optimizer is created."""


@dataclass(frozen=True)
class Rival:
    """An optimizer that is measured."""

    bytes_per_element: int
    make: Callable[[list[Parameter]], Callable[[], object]]
    """The function that makes a step, for parameters that have their gradients."""


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


def llama_100m_shapes() -> list[tuple[int, ...]]:
    """Return the parameters of the paper's LLaMA 100M: 12 layers, 640 wide, 1708 inner, vocabulary 32 100, untied."""
    layer: list[tuple[int, ...]] = [(640, 640)] * 4 + [(1708, 640)] * 2 + [(640, 1708), (640,), (640,)]
    return [(32100, 640), *layer * 12, (640,), (32100, 640)]


CASES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "flat": lambda: [(1 << 25,)],
    "llama_100m": llama_100m_shapes,
    "tiny": lambda: [(64,)] * 2000,
}
"""One tensor of 32 M elements; the parameters of a real model; many tensors so small that overhead dominates."""


def run(
    case: str, device: str, rounds: int, slow: bool, processes: int = 3, names: Sequence[str] = ()
) -> dict[str, Any]:
    """Measure a case; returns the machine and a row for each rival.

    Args:
        case: a name in `CASES`.
        device: "cpu" or "cuda".
        rounds: steps of each optimizer per process.
        slow: with the plain rule and the compiled one too.
        processes: processes per comparison, one after the other.
        names: which rivals; all of them if there are none.
    """
    shapes = CASES[case]()
    count = sum(math.prod(shape) for shape in shapes)
    pairs: dict[str, list[Pair]] = {}
    for name in names or rivals(slow):
        if name == PEER:
            continue
        for process in range(processes):
            pair = in_a_process(measure_pair, name, shapes, device, rounds, process % 2 == 0)
            if pair is None:  # not installed here
                break
            pairs.setdefault(name, []).append(pair)
    copy_seconds = in_a_process(measure_copy, min(count, 1 << 27), device, rounds)
    bandwidth = 8 * min(count, 1 << 27) / copy_seconds
    peers = [Pair(pair.peer, pair.peer, 0, None, None) for found in pairs.values() for pair in found]
    rows = [
        {"optimizer": name, **_figures(found, count, rivals(slow)[name].bytes_per_element, bandwidth)}
        for name, found in {PEER: peers, **pairs}.items()
    ]
    return {"case": case, "tensors": len(shapes), "elements": count, "machine": machine(device),
            "processes": processes, "copy_gigabytes_per_second": bandwidth / 1e9, "rows": rows}  # fmt: skip


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


def _figures(pairs: list[Pair], count: int, bytes_per_element: int, bandwidth: float) -> dict[str, float | None]:
    def nanoseconds(seconds: float) -> float:
        return seconds / count * 1e9

    median = nanoseconds(statistics.median(statistics.median(pair.rival) for pair in pairs))
    best, best_peer = (min(min(getattr(pair, one)) for pair in pairs) for one in ("rival", "peer"))
    ratios, hosts = [pair.ratio for pair in pairs], [pair.host for pair in pairs if pair.host is not None]
    return {
        "ns_median": median,
        "ns_minimum": nanoseconds(best),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
        "ratio_of_best": best / best_peer,
        "bytes": bytes_per_element,
        "gigabytes_per_second": bytes_per_element / median,
        "share_of_copy": bytes_per_element / median * 1e9 / bandwidth,
        "extra_mebibytes": max(pair.extra_bytes for pair in pairs) / 2**20,
        "host_microseconds": statistics.median(hosts) * 1e6 if hosts else None,
        "launches": pairs[0].launches,
    }


def rivals(slow: bool) -> dict[str, Rival]:
    """Return what is measured, by name; `slow` with the plain rule."""

    def stacey(variant: str, p: float, compiled: bool = False, **changes: Any) -> Rival:
        def make(params: list[Parameter]) -> Callable[[], object]:
            optimizer = Stacey(params, p=p, variant=variant, **SETTINGS, **changes)  # type: ignore[arg-type]
            return Compiled(optimizer).step if compiled else optimizer.step

        return Rival(20, make)

    def other(module: str, class_name: str) -> Callable[[list[Parameter]], Callable[[], object]]:
        return lambda params: getattr(importlib.import_module(module), class_name)(params, lr=1e-4).step

    found = {PEER: Rival(28, lambda params: torch.optim.AdamW(params, fused=True).step)}
    for variant, p in VARIANTS:
        name = f"Stacey {variant}, p = {p:g}"
        found[f"{name}, kernel"] = stacey(variant, p, fused=True)
        if slow:
            found[f"{name}, plain rule"] = stacey(variant, p, fused=False)
            found[f"{name}, plain rule compiled"] = stacey(variant, p, compiled=True, fused=False)
    found["torch AdamW, foreach"] = Rival(28, lambda params: torch.optim.AdamW(params, foreach=True).step)
    found["torch SGD, momentum, foreach"] = Rival(20, lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9).step)
    found["lion-pytorch"] = Rival(20, other("lion_pytorch", "Lion"))
    found["torch-optimi StableAdamW"] = Rival(28, other("optimi", "StableAdamW"))
    found["torchao AdamW8bit"] = Rival(16, other("torchao.optim", "AdamW8bit"))
    found["bitsandbytes AdamW8bit"] = Rival(16, other("bitsandbytes.optim", "AdamW8bit"))
    return found


class Compiled:
    """The plain rule by `torch.compile`, on the parameters of a Stacey that has made its states."""

    def __init__(self, optimizer: Stacey) -> None:
        optimizer.step()
        group = optimizer.param_groups[0]
        settings = optimizer._settings(group, torch.float32)
        store = Store("stochastic", 0, 1)

        def update(weight: Tensor, gradient: Tensor, z: Tensor, m: Tensor, key: Tensor) -> None:
            new, z_new, m_new = stacey_update(weight, gradient, z.float(), m.float(), settings)
            store.states_key = key  # type: ignore[assignment]  # a number would compile each step anew
            store.states(z, m, z_new, m_new)
            weight.copy_(new)

        self.update = torch.compile(update, dynamic=len(group["params"]) > 1)
        self.parts = [(p, p.grad, optimizer.state[p]["z"], optimizer.state[p]["m"]) for p in group["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self) -> None:
        """Make one update."""
        self.count += 1
        weight = self.parts[0][0]
        key = torch.tensor(round_key(0, self.count, STATES), dtype=torch.int32, device=weight.device)
        for part in self.parts:
            self.update(*part, key)


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


def machine(device: str | None = None) -> str:
    """Return the processor or GPU (a GPU where there is one, by default), threads and versions, in one line."""
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.exists() else []
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{names[0] if names else platform.processor()}, {capability}, {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, Python {platform.python_version()}"


def table(result: dict[str, Any]) -> str:
    """Return a result in Markdown."""
    head = (
        f"{result['case']}: {result['elements']:,} elements in {result['tensors']:,} tensors; {result['machine']}; "
        f"{result['processes']} processes a pair; copy {result['copy_gigabytes_per_second']:.1f} GB/s\n\n"
        f"| optimizer | ns an element, median (minimum) | × {PEER}, median (lowest to highest of the processes) "
        "| of the best times | bytes | GB/s | of copy | extra MiB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {row['optimizer']} | {row['ns_median']:.3f} ({row['ns_minimum']:.3f}) "
        f"| {row['ratio']:.2f} ({row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f}) | {row['ratio_of_best']:.2f} "
        f"| {row['bytes']} | {row['gigabytes_per_second']:.1f} "
        f"| {row['share_of_copy']:.0%} | {row['extra_mebibytes']:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join([head, *rows])


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of `stacey-dist bench` to its parser."""
    parser.add_argument("--case", action="append", choices=list(CASES), help="one of them; all if not given")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=9, help="steps of each optimizer per process (9)")
    parser.add_argument("--processes", type=int, default=3, help="processes per comparison (3)")
    parser.add_argument("--slow", action="store_true", help="measure the plain rule too, also compiled")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    parser.set_defaults(command=bench)


def bench(case: list[str] | None, device: str, rounds: int, processes: int, slow: bool, json: Path | None) -> int:
    """Measure the cases, print their tables, and write everything to the file `json`."""
    if rounds < 1:
        raise SettingsError(f"--rounds must be at least 1, got {rounds}")
    if processes < 1:
        raise SettingsError(f"--processes must be at least 1, got {processes}")
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("--device cuda: torch sees no GPU here")
    if json is not None and not json.parent.is_dir():
        raise SettingsError(f"--json {json}: {json.parent} is no directory")
    results = []
    for name in case or CASES:
        results.append(run(name, device, rounds, slow and name == "flat", processes))
        print(table(results[-1]), end="\n\n", flush=True)
        if json is not None:
            json.write_text(dumps(results, indent=1, allow_nan=False))
    return 0
