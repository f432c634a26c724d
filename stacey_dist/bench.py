"""What a step of the optimizers costs on this machine: `stacey-dist bench`.

All rivals of a case take turns, round by round, and ratios are medians of a round's pairs, so that whatever else the
machine does hits all alike. Each round has an order of its own: what one leaves in the caches, the next has to clear.
Bytes are what a step has to move at least: weights, gradients and states, read or written.
"""

import json
import platform
import random
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from stacey_dist.optim import Stacey
from stacey_dist.optim.rounding import STATES, Store, round_key
from stacey_dist.optim.rule import stacey_update

PEER = "torch AdamW, fused"
SETTINGS = dict(lr=1e-2, alpha=1e-2, tau=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
VARIANTS = (("p2", 2.8), ("p2", 3.0), ("pp", 2.8), ("2p", 2.8))


@dataclass
class Rival:
    """An optimizer on parameters of its own."""

    name: str
    step: Callable[[], object]
    bytes_per_element: int
    seconds: list[float] = field(default_factory=list)
    extra_bytes: int = 0
    """Memory that a step takes, at most, and gives back."""


def llama_100m_shapes() -> list[tuple[int, ...]]:
    """The parameters of the paper's LLaMA 100M: 12 layers, 640 wide, 1708 inner, vocabulary 32 100, untied."""
    layer: list[tuple[int, ...]] = [(640, 640)] * 4 + [(1708, 640)] * 2 + [(640, 1708), (640,), (640,)]
    return [(32100, 640), *layer * 12, (640,), (32100, 640)]


CASES: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "flat": lambda: [(1 << 25,)],
    "llama_100m": llama_100m_shapes,
    "tiny": lambda: [(64,)] * 2000,
}
"""One tensor of 32 M elements; a real list of parameters; many tensors that are over before they have begun."""


def run(case: str, device: str, rounds: int, slow: bool) -> dict[str, Any]:
    """Measure a case; returns the machine and a row for each rival.

    Args:
        case: a name in `CASES`.
        device: "cpu" or "cuda".
        rounds: how often each rival steps.
        slow: with the plain rule and the compiled one too.
    """
    shapes = CASES[case]()
    torch.manual_seed(0)
    gradients = [torch.randn(shape, device=device) * 1e-3 for shape in shapes]
    rivals = list(_rivals(shapes, gradients, device, slow))
    count = sum(g.numel() for g in gradients)
    copied = torch.empty(min(count, 1 << 27), device=device)
    source = torch.empty_like(copied).normal_()
    copy = Rival("copy", lambda: copied.copy_(source), 8)
    for rival in rivals:
        rival.step()
        rival.step()
        rival.extra_bytes = _extra_bytes(rival.step, device)
    copy.step()
    order, shuffled = [copy, *rivals], random.Random(0)
    for _ in range(rounds):
        shuffled.shuffle(order)
        for rival in order:
            rival.seconds.append(_timed(rival.step, device))
    bandwidth = copy.bytes_per_element * copied.numel() / statistics.median(copy.seconds)
    peer = next(rival for rival in rivals if rival.name == PEER)
    rows = []
    for rival in rivals:
        nanoseconds = [second / count * 1e9 for second in rival.seconds]
        rate = rival.bytes_per_element / statistics.median(nanoseconds)
        rows.append(
            {
                "optimizer": rival.name,
                "ns_median": statistics.median(nanoseconds),
                "ns_minimum": min(nanoseconds),
                "ratio": statistics.median(a / b for a, b in zip(rival.seconds, peer.seconds, strict=True)),
                "bytes": rival.bytes_per_element,
                "gigabytes_per_second": rate,
                "share_of_copy": rate * 1e9 / bandwidth,
                "extra_mebibytes": rival.extra_bytes / 2**20,
            }
        )
    return {"case": case, "tensors": len(shapes), "elements": count, "machine": machine(device),
            "copy_gigabytes_per_second": bandwidth / 1e9, "rows": rows}  # fmt: skip


def _rivals(shapes: list[tuple[int, ...]], gradients: list[Tensor], device: str, slow: bool) -> Iterator[Rival]:
    def parameters() -> list[Parameter]:
        torch.manual_seed(1)
        made = [Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
        for param, gradient in zip(made, gradients, strict=True):
            param.grad = gradient
        return made

    yield Rival(PEER, torch.optim.AdamW(parameters(), fused=True).step, 28)
    for variant, p in VARIANTS:
        name = f"Stacey {variant}, p = {p:g}"
        yield Rival(f"{name}, kernel", Stacey(parameters(), p=p, variant=variant, **SETTINGS).step, 20)  # type: ignore[arg-type]
        if slow:
            plain = Stacey(parameters(), p=p, variant=variant, fused=False, **SETTINGS)  # type: ignore[arg-type]
            yield Rival(f"{name}, plain rule", plain.step, 20)
            yield Rival(f"{name}, plain rule compiled", Compiled(plain).step, 20)
    yield Rival("torch AdamW, foreach", torch.optim.AdamW(parameters(), foreach=True).step, 28)
    yield Rival("torch SGD, momentum, foreach", torch.optim.SGD(parameters(), 1e-3, momentum=0.9).step, 20)
    for module, class_name, name, size in (
        ("lion_pytorch", "Lion", "lion-pytorch", 20),
        ("optimi", "StableAdamW", "torch-optimi StableAdamW", 28),
        ("torchao.optim", "AdamW8bit", "torchao AdamW8bit", 16),
        ("bitsandbytes.optim", "AdamW8bit", "bitsandbytes AdamW8bit", 16),
    ):
        try:
            optimizer_class = getattr(__import__(module, fromlist=[class_name]), class_name)
            yield Rival(name, optimizer_class(parameters(), lr=1e-4).step, size)
        except (ImportError, RuntimeError):
            continue


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
        """One update."""
        self.count += 1
        weight = self.parts[0][0]
        key = torch.tensor(round_key(0, self.count, STATES), dtype=torch.int32, device=weight.device)
        for part in self.parts:
            self.update(*part, key)


def _timed(work: Callable[[], object], device: str) -> float:
    _finish(device)
    begin = time.perf_counter()
    work()
    _finish(device)
    return time.perf_counter() - begin


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _extra_bytes(work: Callable[[], object], device: str) -> int:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with _watched_memory() as most:
        work()
    return most[0]


@contextmanager
def _watched_memory() -> Iterator[list[int]]:
    """How much more memory than before this process has at most, while entered."""

    def now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before, most, running = now(), [0], True

    def watch() -> None:
        while running:
            most[0] = max(most[0], now() - before)
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        running = False
        thread.join()


def machine(device: str | None = None) -> str:
    """The processor or GPU (the GPU, if there is one and nothing is said), threads, and versions, in one line."""
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
    """A result in Markdown."""
    head = (
        f"{result['case']}: {result['elements']:,} elements in {result['tensors']:,} tensors; {result['machine']}; "
        f"copy {result['copy_gigabytes_per_second']:.1f} GB/s\n\n"
        f"| optimizer | ns an element, median (minimum) | × {PEER} | bytes | GB/s | of copy | extra MiB |\n"
        "|---|---|---|---|---|---|---|"
    )
    rows = [
        f"| {row['optimizer']} | {row['ns_median']:.3f} ({row['ns_minimum']:.3f}) | {row['ratio']:.2f} "
        f"| {row['bytes']} | {row['gigabytes_per_second']:.1f} "
        f"| {row['share_of_copy']:.0%} | {row['extra_mebibytes']:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join([head, *rows])


def bench(cases: list[str], device: str, rounds: int, slow: bool, json_file: Path | None) -> int:
    """Measure the cases, print their tables, and write everything to `json_file`."""
    results = []
    for case in cases:
        results.append(run(case, device, rounds, slow and case == "flat"))
        print(table(results[-1]), flush=True)
        print()
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1))
    return 0
