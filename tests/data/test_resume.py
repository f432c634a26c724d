"""A preparation ends with the same bytes however often it is killed, and whoever else prepares the same."""

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stacey_dist.data import prepare
from tests.data.helpers import ByteTokenizer, list_source, texts, tree

ROOT = Path(__file__).parents[2]

CHILD = """
import sys, time, types
from pathlib import Path
# The data package alone: the whole one loads torch, which takes seconds.
sys.modules["stacey_dist"] = types.ModuleType("stacey_dist")
sys.modules["stacey_dist"].__path__ = ["stacey_dist"]
from stacey_dist.data import blocks, encoding, parts, preparation, prepare
from stacey_dist.data import Source, reuse
from tests.data.helpers import ByteTokenizer, list_input, list_source, texts
reuse._CHUNK = 100
reuse._DOCUMENTS = 7
encoding._CHUNK_TOKENS, encoding._GROUP_BYTES = 100, 300
preparation._COMMIT_TOKENS, preparation._COMMIT_TOKENS_PER_INPUT, preparation._POLL_SECONDS = 700, 0, 0.01
parts.PART_TOKENS, blocks.BATCH_BYTES = 3000, 200
cache, delay, kind, log = Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3], open(sys.argv[4], "a")

class Slow(ByteTokenizer):
    def encode_batch(self, batch):
        time.sleep(delay)
        log.write("x" * len(batch))
        log.flush()
        return super().encode_batch(batch)

source = list_source(texts(1500), texts(300, seed=1) if kind == "separate" else None)
limit, workers = 40_000, 1
if kind in ("inputs", "reuse", "workers"):
    inputs = [list_input(texts(count, seed=count), str(count)) for count in range(1, 60)]
    source = Source(inputs, "inputs")
if kind == "workers":
    limit, workers = None, 3
if kind == "reuse" and cache.name == "killed" and not cache.exists():
    prepare(source, ByteTokenizer(), cache, max_tokens=30_000, validation_every=7, progress=False)
print("ready", flush=True)
prepare(source, Slow(), cache, max_tokens=limit, validation_every=10, progress=False, workers=workers)
"""


def start(cache: Path, delay: float, kind: str) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(cache), str(delay), kind, f"{cache}.log"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def encoded(cache: Path) -> int:
    """How many documents all processes have encoded."""
    return Path(f"{cache}.log").stat().st_size


@pytest.mark.parametrize(
    "kind",
    [
        "inputs",
        "workers",
        *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("separate", "held out", "reuse")),
    ],
)
def test_killed_again_and_again_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    assert start(tmp_path / "whole", 0, kind).wait() == 0
    (whole,) = (tmp_path / "whole").iterdir()
    killed = tmp_path / "killed" / whole.name
    kills, generator = 0, random.Random(kind)
    while kills < 4 or not (killed / "progress.json").exists():
        child = start(tmp_path / "killed", 0.003, kind)
        # By what it has encoded: on a busy machine, every child would be killed before it has done anything.
        enough = encoded(tmp_path / "killed") + generator.randint(0, 80)
        while encoded(tmp_path / "killed") < enough and child.poll() is None:
            time.sleep(generator.uniform(0, 0.02))
        child.kill()
        if child.wait() == 0:  # it was done before it was killed: from the beginning
            shutil.rmtree(tmp_path / "killed")
            Path(f"{tmp_path / 'killed'}.log").unlink()
            kills = 0
            continue
        assert child.returncode == -signal.SIGKILL
        kills += 1
    # What lies behind the last commit counts for nothing, whatever it is.
    with open(max(killed.glob("train-*.bin")), "ab") as file:
        file.write(b"junk")
    (killed / "train-00099.bin").write_bytes(b"junk")
    last = max((killed / "chunks").glob("*/*.npz"))
    last.with_name(f"{last.name}.tmp").write_bytes(b"junk")
    assert start(tmp_path / "killed", 0, kind).wait() == 0
    assert tree(killed) == tree(whole)
    # A kill loses what each worker was at: a chunk of one batch, which is less than 20 documents.
    lost = encoded(tmp_path / "killed") - encoded(tmp_path / "whole")
    assert lost <= 20 * kills * (3 if kind == "workers" else 1)
    assert kind == "reuse" or lost >= 0


def test_damaged_progress_starts_over(tmp_path: Path) -> None:
    whole = prepare(list_source(texts(90)), ByteTokenizer(), tmp_path / "a", max_tokens=None, validation_every=9)
    directory = tmp_path / "b" / whole.name
    directory.mkdir(parents=True)
    state = {"documents": 30, "parts": []}
    good = {
        "position": {split: {"current": {}, "bytes": 0, "finished": False} for split in ("train", "validation")},
        "inputs": {"train": [], "validation": []},
        "splits": {"train": state, "validation": state | {"documents": 0}},
    }
    longer_than_its_part = json.loads(json.dumps(good))
    longer_than_its_part["splits"]["train"]["parts"] = [{"name": "train-00000.bin", "tokens": 10**6, "crc32": 0}]
    places_of_an_older_version = {
        split: {"input": 3, "read": 30, "bytes": 0, "finished": False} for split in good["splits"]
    }
    of_an_older_version = good | {"position": places_of_an_older_version}
    for progress in ("{", "{}", "[]", json.dumps(longer_than_its_part), json.dumps(of_an_older_version)):
        (directory / "progress.json").write_text(progress)
        (directory / "index.json").unlink(missing_ok=True)
        prepare(list_source(texts(90)), ByteTokenizer(), tmp_path / "b", max_tokens=None, validation_every=9)
        assert tree(directory) == tree(whole)


@pytest.mark.parametrize("kind", [pytest.param("held out", marks=pytest.mark.exhaustive), "workers"])
def test_two_processes_at_once(tmp_path: Path, kind: str) -> None:
    """No document is encoded twice. Workers share the work, as they do on several hosts."""
    children = [start(tmp_path / "cache", 0.001, kind) for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert start(tmp_path / "alone", 0, kind).wait() == 0
    assert encoded(tmp_path / "cache") == encoded(tmp_path / "alone")
    (together,), (alone,) = (tmp_path / "cache").iterdir(), (tmp_path / "alone").iterdir()
    assert tree(together) == tree(alone)
