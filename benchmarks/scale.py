"""What grows with the number of processes: tables for N, 2 N and 4 N of them, on one machine and in a few minutes.

    python benchmarks/scale.py              # all tables
    python benchmarks/scale.py saving       # one of them

Some have real processes, others what thousands of processes would send, made in memory. Times are of the processor.
"""

import argparse
import functools
import gzip
import itertools
import json
import math
import os
import pickle
import resource
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
import transformers

from stacey_dist.bench import machine
from stacey_dist.checkpoint.collectives import rank0_call
from stacey_dist.checkpoint.retention import newest_usable, retain
from stacey_dist.checkpoint.shard import shard_name
from stacey_dist.checkpoint.shares import _MODULUS, Ledger, Share, _hash
from stacey_dist.checkpoint.write import _finish
from stacey_dist.data import TokenStream, files_source, load_pretrained, prepare, standard_library_documents
from stacey_dist.data.images import open_images
from stacey_dist.data.parts import part_name

MANY = (1024, 2048, 4096)
Kinds = dict[str, tuple[tuple[int, ...], str]]


def show(title: str, *rows: tuple[object, ...]) -> None:
    """Print a table; the first row is its head."""
    print(f"\n{title}\n")
    for row in rows:
        print("| " + " | ".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row) + " |")
        if row is rows[0]:
            print("|---" * len(row) + "|")


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
    begun = json.dumps(contents).encode()
    return {
        count: [
            Share(1 << 40, "ab" * 32, True, (after - before) % _MODULUS, b"" if place else begun)
            for place, (before, after) in enumerate(itertools.pairwise(edges))
        ]
        for count, edges in sums.items()
    }


def _save(ledger: Ledger, everyone: list[Share]) -> tuple[float, int]:
    """Return the first process's seconds for a save, with those to look at the manifest afterwards, and its bytes."""
    records = [share.record() for share in everyone]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "step_00000001"
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.mkdir()
        for place in range(len(everyone)):
            (temporary / shard_name(place)).touch()
        begin = time.process_time()
        tensors = {sender: everyone[sender].tensors for sender, _ in ledger.unknown(records)}
        assert ledger.combine(records, tensors), "not complete"
        _finish(path, temporary, ledger, {})
        retain(path, keep_last=1)
        assert newest_usable(path.parent) == path
        seconds = time.process_time() - begin
    return seconds, sum(map(len, records)) + sum(map(len, tensors.values()))


def saving() -> None:
    """What the first process does in a save while it trains, for what all of them have written."""
    head = ("processes", "first save: s", "bytes received", "later save: s", "bytes received", "ms a process")
    for model, contents, counts in (
        ("LLaMA of 70 B", kinds(80), MANY),
        ("10 000 expert tensors", kinds(26, 128), (64, 128, 256)),
    ):
        rows = []
        for count, everyone in shares(contents, counts).items():
            ledger = Ledger()
            (first, sent), (later, sent_later) = _save(ledger, everyone), _save(ledger, everyone)
            rows.append((count, first, sent, later, sent_later, 1000 * later / count))
        show(f"Saving: {model}, {len(contents)} tensors", head, *rows)


opened: list[str] = []
sys.addaudithook(lambda event, arguments: opened.append(str(arguments[0])) if event == "open" else None)


def _files_opened(work: Callable[[], Any], place: Path) -> tuple[int, float, Any]:
    """Return how many files below a directory are opened in a call, its milliseconds, and its result."""
    opened.clear()
    begin = time.process_time()
    result = work()
    return sum(path.startswith(str(place)) for path in opened), 1000 * (time.process_time() - begin), result


def parts() -> None:
    """What prepared tokens take to open, on the first process and on the others."""
    rows = []
    for count in (1, 4_000, 8_000, 16_000):
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            entries = [{"name": part_name("train", i), "tokens": 64, "crc32": 0} for i in range(count)]
            for entry in entries:
                (directory / str(entry["name"])).write_bytes(bytes(128))
            index = {"format": 1, "dtype": "<u2", "vocab_size": 9, "end_token_id": 0, "tokenizer": ""}
            (directory / "index.json").write_text(json.dumps(index | {"splits": {"train": {"parts": entries}}}))
            files, first, stream = _files_opened(functools.partial(TokenStream, directory, "train", 8), directory)
            pickled = pickle.dumps(stream)
            others, other, copy = _files_opened(functools.partial(pickle.loads, pickled), directory)
            before = len(os.listdir("/proc/self/fd"))
            for window in range(0, len(copy), 8):
                copy.window(window)
            kept = len(os.listdir("/proc/self/fd")) - before
            rows.append((count, files, first, others, other, len(pickled), kept))
    head = (
        "parts",
        "files opened",
        "ms",
        "on others: files",
        "ms",
        "bytes sent to each",
        "kept open after all are read",
    )
    show("Opening prepared tokens", head, *rows)


def _spent() -> tuple[float, float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used), time.perf_counter()


def preparing() -> None:
    """What tokens take of processors, beside the loop that one writes with the `tokenizers` library."""
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    texts = [document.text for document in standard_library_documents()]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trained.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=8000, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a core is what is compared
    spent: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>").save_pretrained(place)
        tokenizer = load_pretrained(place)
        files = [str(directory / f"{i}.json.gz") for i in range(8)]
        for i, file in enumerate(files):
            with gzip.open(file, "wt") as lines:
                lines.writelines(json.dumps({"text": text}) + "\n" for text in texts[i::4])

        def plain() -> int:
            count = 0
            with open(directory / "plain.bin", "wb") as out:
                for file in files:
                    with gzip.open(file, "rt") as lines:
                        while some := list(itertools.islice(lines, 500)):
                            batch = [json.loads(line)["text"] for line in some]
                            for encoding in trained.encode_batch_fast(batch, add_special_tokens=False):
                                ids = np.array([*encoding.ids, 0], np.uint16)
                                out.write(ids.tobytes())
                                count += len(ids)
            return count

        def prepared(workers: int) -> int:
            cache = Path(tempfile.mkdtemp(dir=place))
            source = files_source(files, [], "text")
            found = prepare(
                source, tokenizer, cache, max_tokens=None, validation_every=50, progress=False, workers=workers
            )
            return sum(TokenStream(found, split, 8).tokens for split in ("train", "validation"))

        ways = {"plain loop": plain} | {f"{n} workers": functools.partial(prepared, n) for n in (1, 2, 4)}
        for name, way in [*ways.items()] * 2:
            before = _spent()
            tokens = way()
            after = _spent()
            spent.setdefault(name, []).append((after[0] - before[0], after[1] - before[1]))
    least = {name: tuple(map(min, zip(*times, strict=True))) for name, times in spent.items()}
    rows = [
        (name, 1e9 * cores / tokens, least["plain loop"][0] / cores, 1e-3 * tokens / seconds)
        for name, (cores, seconds) in least.items()
    ]
    head = ("", "ns of processors a token", "tokens a core, of the plain loop's", "thousand tokens a second")
    show(f"Preparing {tokens:,} tokens; the least of {len(spent[name])}", head, *rows)


def image_starts() -> None:
    """What images in folders take to start with, on the first process and on the others."""
    rows = []
    for count in (40_000, 80_000, 160_000):
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            for folder in (directory / "data" / split / f"{i:04d}" for split in ("train", "val") for i in range(100)):
                folder.mkdir(parents=True)
                (folder / "first.JPEG").write_bytes(bytes(1000))
                for i in range(1, count // 100 if folder.parent.name == "train" else 1):
                    os.link(folder / "first.JPEG", folder / f"{folder.name}_{i:08d}.JPEG")
                os.utime(folder, (1, 1))

            def start(data: Path = directory / "data", cache: Path = directory / "cache") -> Any:
                images = open_images(str(data), cache_dir=str(cache))[0]
                assert images.identity
                return images

            (_, first, _), (files, later, images) = _files_opened(start, directory), _files_opened(start, directory)
            pickled = pickle.dumps(images)
            others, other, _ = _files_opened(functools.partial(pickle.loads, pickled), directory)
            rows.append((count, first / 1000, later / 1000, files, len(pickled), others, other))
    head = (
        "images",
        "first start: s",
        "later start: s",
        "files opened",
        "bytes sent to each",
        "on others: files",
        "ms",
    )
    show("Starting with images", head, *rows)


TABLES = (resume, saving, parts, preparing, image_starts)

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
