"""The table of scale.py about preparing text."""

import functools
import gzip
import itertools
import json
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

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

_ROUNDS = 3


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
