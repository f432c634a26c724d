"""What grows with the number of processes: tables for N, 2 N and 4 N of them, on one machine and in a few minutes.

    python benchmarks/scale.py              # all tables
    python benchmarks/scale.py saving       # one of them

Some have real processes, others what thousands of processes would send, made in memory. Times are of the processor.
"""

import argparse
import functools
import itertools
import math
import pickle
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import show
from scale_data import image_starts, parts, preparing
from scale_heartbeats import heartbeats

from stacey_dist.checkpoint.collectives import rank0_call
from stacey_dist.checkpoint.retention import newest_usable, retain
from stacey_dist.checkpoint.shard import Range, _header, shard_name
from stacey_dist.checkpoint.shares import _MODULUS, Share, _hash, is_complete
from stacey_dist.checkpoint.write import finish
from stacey_dist.files import parse_json
from stacey_dist.info import machine

MANY = (1024, 2048, 4096)
Kinds = dict[str, tuple[tuple[int, ...], str]]


def in_processes(work: Callable[..., Any], count: int, *arguments: Any) -> Any:
    """Call `work(rank, *arguments)` in processes that are joined by gloo; return the last one's result."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = get_context("fork")
    results = context.Queue()
    joined = [
        context.Process(target=_join, args=(work, rank, count, port, results, arguments)) for rank in range(count)
    ]
    for process in joined:
        process.start()
    result = results.get()
    for process in joined:
        process.join()
    return result


def _join(work: Callable[..., Any], rank: int, count: int, port: int, results: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    result = work(rank, *arguments)
    if rank == count - 1:
        results.put(result)
    dist.barrier()
    dist.destroy_process_group()


def kinds(layers: int, experts: int = 0) -> Kinds:
    """Return the tensors of a checkpoint: LLaMA's of 70 billion parameters has 80 layers."""
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (32000, 8192), "norm": (8192,), "lm_head": (32000, 8192)}
    projections = {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.self_attn.{name}_proj": shape for name, shape in projections.items()}
        shapes |= {f"layers.{layer}.{name}_layernorm": (8192,) for name in ("input", "post_attention")}
        if not experts:
            shapes |= {f"layers.{layer}.mlp.{name}_proj": (28672, 8192) for name in ("gate", "up", "down")}
        for expert in range(experts):
            shapes |= {f"layers.{layer}.mlp.experts.{expert}.{x}_proj": (4096, 2048) for x in ("gate", "up", "down")}
    found: Kinds = {}
    for name, shape in shapes.items():
        found[f"model/model.{name}.weight"] = shape, "float32"
        found |= {f"optimizer/model.{name}.weight/{key}": (shape, "bfloat16") for key in ("z", "m")}
        found[f"optimizer/model.{name}.weight/step"] = (), "int64"
    return found


def _receive(rank: int, size: int) -> int:
    most, original = 0, torch.empty

    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal most
        tensor = original(*arguments, **options)
        most += tensor.nbytes if tensor.dtype == torch.uint8 else 0
        return tensor

    torch.empty = empty
    rank0_call(lambda: b"x" * size)
    torch.empty = original
    return most


def resume() -> None:
    """What a process takes for the manifest that the first one has read."""
    size = 2_670_000
    rows = [(n, in_processes(_receive, n, size) / 2**20) for n in (2, 4, 8)]
    show(f"Resuming: a manifest of {size / 2**20:.2f} MiB", ("processes", "MiB of buffers on the last one"), *rows)


def shares(contents: Kinds, counts: tuple[int, ...]) -> dict[int, list[Share]]:
    """Return what each of so many processes of FSDP2 says of a save. Rows are dealt out as evenly as they can be."""
    sums = {count: [0] * (count + 1) for count in counts}
    for name, (shape, dtype) in contents.items():
        rows, row = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        at_row = functools.cache(
            lambda place, tensor=f"{name} {shape} {dtype}", row=row: _hash(f"{tensor} {place * row}")
        )
        for count in counts:
            each = -(-rows // count)
            for place in range(count + 1):
                sums[count][place] += at_row(min(rows, place * each))
    file = {"bytes": 1 << 40, "sha256": "ab" * 32}
    return {
        count: [
            Share(file, True, {} if place else contents, (after - before) % _MODULUS)
            for place, (before, after) in enumerate(itertools.pairwise(edges))
        ]
        for count, edges in sums.items()
    }


def _save(everyone: list[Share]) -> tuple[float, int]:
    """Return the first process's seconds for a save, with those to look at the manifest afterwards, and its bytes."""
    messages = [pickle.dumps(share) for share in everyone[1:]]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "step_00000001"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.mkdir()
        for place in range(len(everyone)):
            (temporary / shard_name(place)).touch()
        begin = time.process_time()
        received = [everyone[0], *map(pickle.loads, messages)]
        assert is_complete(received), "not complete"
        finish(path, temporary, received, {})
        retain(path, keep_last=1)
        assert newest_usable(path.parent) == path
        seconds = time.process_time() - begin
    return seconds, len(everyone) * (8 + max(map(len, messages)))  # all messages are as long, and their lengths


def saving() -> None:
    """What the first process does in a save while it trains, for what all of them have written."""
    head = ("processes", "s", "bytes received", "ms a process")
    for model, contents, counts in (
        ("LLaMA of 70 B", kinds(80), MANY),
        ("10 000 expert tensors", kinds(26, 128), (64, 128, 256)),
    ):
        rows = []
        for count, everyone in shares(contents, counts).items():
            seconds, received = _save(everyone)
            rows.append((count, seconds, received, 1000 * seconds / count))
        show(f"Saving: {model}, {len(contents)} tensors", head, *rows)


def headers() -> None:
    """What each process writes and reads again of the names of tensors, whatever their number of elements."""
    rows = []
    for model, contents, parameters in (("70 B", kinds(80), 69e9), ("10 000 expert tensors", kinds(26, 128), 87e9)):
        names = [(name, Range(0, torch.empty(1, dtype=getattr(torch, dtype)))) for name, (_, dtype) in contents.items()]
        begin = time.process_time()
        header = _header(names)
        written = time.process_time()
        entries = parse_json(header[8:])
        parse_json(entries["__metadata__"]["DCP_SHARDING_INFO"])
        read = time.process_time()
        for count in MANY:
            share = 100 * len(header) * count / (8 * parameters)  # of float32 weights and bfloat16 z and m
            figures = count, len(header) / 2**20, written - begin, read - written, len(header) * count / 2**30, share
            rows.append((model, *figures))
    head = ("model", "processes", "MiB a header", "s to write it", "s to read it", "GiB of all", "% of the checkpoint")
    show("Headers of the processes' files", head, *rows)


TABLES = (resume, saving, headers, heartbeats, parts, preparing, image_starts)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [table.__name__ for table in TABLES]
    parser.add_argument("tables", nargs="*", default=names, metavar="TABLE", help=", ".join(names))
    chosen = parser.parse_args().tables
    if unknown := set(chosen) - set(names):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    print(machine())
    for table in TABLES:
        if table.__name__ in chosen:
            table()
