"""`stacey-dist bench`: the cases, their tables, and the options.

The table has the median over the processes that measure an optimizer, with the lowest and the highest. Bytes are the
least that a step must move: weights, gradients and states, read or written.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Collection
from json import dumps
from pathlib import Path
from typing import Any

import torch

from stacey_dist.bench.pairs import Pair, in_a_process, measure_copy, measure_pair
from stacey_dist.bench.rivals import PEER, rivals
from stacey_dist.errors import SettingsError
from stacey_dist.info import machine


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


def run(case: str, device: str, rounds: int, processes: int, names: Collection[str]) -> dict[str, Any]:
    """Measure a case; returns the machine and a row for each rival.

    Args:
        case: a name in `CASES`.
        device: "cpu" or "cuda".
        rounds: steps of each optimizer per process.
        processes: processes per comparison, one after the other.
        names: of `rivals`. One that is not installed here has no row.
    """
    shapes = CASES[case]()
    count = sum(math.prod(shape) for shape in shapes)
    pairs: dict[str, list[Pair]] = {}
    known = rivals(slow=True)
    for name in names:
        for process in range(processes):
            pair = in_a_process(measure_pair, name, shapes, device, rounds, process % 2 == 0)
            if pair is None:
                break
            pairs.setdefault(name, []).append(pair)
    copy_seconds = in_a_process(measure_copy, min(count, 1 << 27), device, rounds)
    bandwidth = 8 * min(count, 1 << 27) / copy_seconds
    peers = [Pair(pair.peer, pair.peer, 0, None, None) for found in pairs.values() for pair in found]
    rows = [
        {"optimizer": name, **_figures(found, count, known[name].bytes_per_element, bandwidth)}
        for name, found in {PEER: peers, **pairs}.items()
    ]
    return {"case": case, "tensors": len(shapes), "elements": count, "machine": machine(device),
            "processes": processes, "copy_gigabytes_per_second": bandwidth / 1e9, "rows": rows}  # fmt: skip


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to measure (cpu)")
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
        names = [rival for rival in rivals(slow and name == "flat") if rival != PEER]
        results.append(run(name, device, rounds, processes, names))
        print(table(results[-1]), end="\n\n", flush=True)
        if json is not None:
            json.write_text(dumps(results, indent=1, allow_nan=False))
    return 0
