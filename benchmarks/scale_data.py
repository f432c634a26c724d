"""The tables of scale.py about data: prepared tokens, preparing them, images."""

import functools
import gzip
import itertools
import json
import os
import pickle
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import transformers
from measure import show

from stacey_dist.data import (
    TokenStream,
    encoding,
    files_source,
    load_pretrained,
    prepare,
    standard_library_documents,
)
from stacey_dist.data.images import open_images
from stacey_dist.data.parts import part_name

_ROUNDS = 3

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
    encoding._GROUP_BYTES = 2**16  # so that one worker does not take all of these small files
    spent: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        transformers.PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="</s>").save_pretrained(place)
        tokenizer = load_pretrained(place)
        files = [str(directory / f"{i}.json.gz") for i in range(16)]
        for i, file in enumerate(files):
            with gzip.open(file, "wt") as lines:
                lines.writelines(json.dumps({"text": text}) + "\n" for text in texts[i % 2 :: 2])

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

        ways = {"plain loop": plain} | {f"{n} workers": functools.partial(prepared, n) for n in (1, 2)}
        for name, way in [*ways.items()] * _ROUNDS:
            before = _spent()
            tokens = way()
            after = _spent()
            spent.setdefault(name, []).append((after[0] - before[0], after[1] - before[1]))
    rows = []
    for name, times in spent.items():
        # The clock of a shared machine changes, so each is compared with the others of its own round.
        rounds = list(zip(times, spent["plain loop"], spent["1 workers"], strict=True))
        cores = statistics.median(plain[0] / ours[0] for ours, plain, _ in rounds)
        speed = statistics.median(one[1] / ours[1] for ours, _, one in rounds)
        rows.append((name, 1e-3 * tokens / min(seconds for _, seconds in times), cores, speed))
    head = ("", "thousand tokens a second", "tokens a core, of the plain loop's", "speed, of 1 workers'")
    show(f"Preparing {tokens:,} tokens; medians of {_ROUNDS} rounds, the fastest's tokens a second", head, *rows)


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
