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
from stacey_dist.data import parts, preparation, prepare, readahead
from stacey_dist.data import Source, reuse
from tests.data.helpers import ByteTokenizer, list_input, list_source, texts
reuse._CHUNK = 100
preparation._COMMIT_TOKENS = 700
parts.PART_TOKENS, readahead.BATCH_BYTES = 3000, 200

class Slow(ByteTokenizer):
    def encode_batch(self, batch):
        time.sleep(float(sys.argv[2]))
        return super().encode_batch(batch)

tokenizer = Slow()
kind = sys.argv[3]
source = list_source(texts(1500), texts(300, seed=1) if kind == "separate" else None)
if kind in ("inputs", "reuse"):
    inputs = [list_input(texts(count, seed=count), str(count)) for count in range(1, 60)]
    source = Source(inputs, "inputs")
if kind == "reuse" and Path(sys.argv[1]).name == "killed" and not Path(sys.argv[1]).exists():
    prepare(source, tokenizer, Path(sys.argv[1]), max_tokens=30_000, validation_every=7, progress=False)
    tokenizer.encoded = 0
print("ready", flush=True)
prepare(source, tokenizer, Path(sys.argv[1]), max_tokens=40_000, validation_every=10, progress=False)
print("encoded", tokenizer.encoded, flush=True)
"""


def start(cache: Path, delay: float, kind: str) -> "subprocess.Popen[str]":
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(cache), str(delay), kind],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("kind", ["separate", "held out", "inputs", "reuse"])
def test_killed_again_and_again_gives_the_same_bytes(tmp_path: Path, kind: str) -> None:
    everything = int(start(tmp_path / "whole", 0, kind).communicate()[0].split()[1])
    (whole,) = (tmp_path / "whole").iterdir()
    killed = tmp_path / "killed" / whole.name
    kills, generator = 0, random.Random(kind)
    while kills < 4 or not (killed / "progress.json").exists():
        child = start(tmp_path / "killed", 0.003, kind)
        time.sleep(generator.uniform(0.02, 0.2))
        child.kill()
        if child.wait() == 0:  # it was done before it was killed: from the beginning
            shutil.rmtree(tmp_path / "killed")
            kills = 0
            continue
        assert child.returncode == -signal.SIGKILL
        kills += 1
    # What lies behind the last commit counts for nothing, whatever it is.
    with open(max(killed.glob("train-*.bin")), "ab") as file:
        file.write(b"junk")
    (killed / "train-00099.bin").write_bytes(b"junk")
    progress = json.loads((killed / "progress.json").read_text())
    finished = [record for records in progress["inputs"].values() for record in records]
    current = [place["current"] for place in progress["position"].values() if place["current"]]
    done = sum(record["read"] for record in (*current, *finished))
    assert done > 0
    last = start(tmp_path / "killed", 0, kind)
    output = last.communicate()[0]
    assert tree(killed) == tree(whole)
    # A batch may be read beyond the limit, and begins elsewhere.
    assert int(output.split()[1]) <= everything - done + 20


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


def test_two_processes_at_once(tmp_path: Path) -> None:
    children = [start(tmp_path / "cache", 0.001, "held out") for _ in range(2)]
    outputs = [child.communicate()[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(int(output.split()[1]) > 0 for output in outputs) == [False, True]
    start(tmp_path / "alone", 0, "held out").wait()
    (together,), (alone,) = (tmp_path / "cache").iterdir(), (tmp_path / "alone").iterdir()
    assert tree(together) == tree(alone)
