"""A launcher, with its samples recorded and accidents on the way, as the environment asks for.

LAUNCHER=train_imagenet is the other launcher; train_llm is meant otherwise.

RECORD=FILE appends the position of each update and checksums of its samples to FILE.RANK.
ACCIDENT="EVENT RANK COUNT SIGNAL" sends the signal to process RANK as it comes to EVENT for the COUNTth time; several
are separated by semicolons.
"""

import json
import os
import shutil
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist.checkpoint import replace, write
from stacey_dist.training import deepspeed_engine, engine, loop, saving
from stacey_dist.training.launchers import IMAGES, LLM
from stacey_dist.training.tasks import images, llm

LAUNCHERS = {
    "train_llm": (LLM, llm.LanguageModeling),
    "train_imagenet": (IMAGES, images.ImageClassification),
}
launcher, task = LAUNCHERS[os.environ.get("LAUNCHER", "train_llm")]

EVENTS = {
    "forward": (task, "loss"),
    "backward": (engine.Engine, "backward"),
    "update": (engine.Engine, "finish_update"),
    "save": (saving.Saver, "save"),
    "before writing": (write, "write_shard"),
    "written": (os, "fsync"),
    "before the manifest": (write, "finish"),
    "manifest": (write, "write_manifest"),
    "rename": (Path, "rename"),
    "renamed": (replace, "sync_directory"),
    "retention": (saving, "retain"),
    "deletion": (shutil, "rmtree"),
    "evaluation": (loop, "_evaluate"),
}
# DeepSpeed's engine has its own.
ALSO = {"backward": (deepspeed_engine.DeepSpeedEngine, "backward")}


def main():
    record, accident = os.environ.get("RECORD"), os.environ.get("ACCIDENT")
    rank = os.environ.get("RANK", "0")
    if record:
        record_samples(Path(f"{record}.{rank}"))
    for one in accident.split(";") if accident else []:
        event, at, count, number = one.rsplit(" ", 3)
        if at == rank:
            arrange(event, int(count), int(number))
    launcher.main()


def record_samples(path):
    original = task.micro_batches

    def micro_batches(self, position):
        for batch in original(self, position):
            with path.open("a") as file:
                file.write(json.dumps([position, samples_of(batch)]) + "\n")
            yield batch

    task.micro_batches = micro_batches


def samples_of(batch):
    """What tells each sample of a batch from others: all of its content."""
    columns = (batch.pixels, batch.labels) if task is images.ImageClassification else (batch.inputs, batch.labels)
    return [
        zlib.crc32(x.contiguous().numpy().tobytes(), zlib.crc32(y.numpy().tobytes()))
        for x, y in zip(*columns, strict=True)
    ]


def arrange(event, count, number):
    left = [count]
    for owner, name in [EVENTS[event], *([ALSO[event]] if event in ALSO else [])]:
        original = getattr(owner, name)

        def then(*arguments, original=original, **options):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), number)
            return original(*arguments, **options)

        setattr(owner, name, then)


if __name__ == "__main__":
    main()
