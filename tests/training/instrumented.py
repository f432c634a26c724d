"""train_llm.py, with its samples recorded and accidents on the way, as the environment asks for.

RECORD=FILE appends the ids of each update's samples to FILE.RANK. ACCIDENT="EVENT RANK COUNT SIGNAL" sends the signal
to process RANK as it comes to EVENT for the COUNTth time; several are separated by semicolons.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train_llm
from stacey_dist.checkpoint import write
from stacey_dist.training import engine, llm, loop, saving

EVENTS = {
    "forward": (llm.LanguageModeling, "loss"),
    "backward": (engine.Engine, "backward"),
    "update": (engine.Engine, "finish_update"),
    "save": (saving.Saver, "save"),
    "before writing": (write, "write_shard"),
    "written": (os, "fsync"),
    "before the manifest": (write, "_check_complete"),
    "manifest": (write.json, "dump"),
    "rename": (Path, "rename"),
    "renamed": (write, "_sync"),
    "retention": (saving, "retain"),
    "deletion": (shutil, "rmtree"),
    "evaluation": (loop, "_evaluate"),
}
# DeepSpeed's engine has its own.
ALSO = {"backward": (engine.DeepSpeedEngine, "backward"), "update": (engine.DeepSpeedEngine, "finish_update")}


def main():
    record, accident = os.environ.get("RECORD"), os.environ.get("ACCIDENT")
    rank = os.environ.get("RANK", "0")
    if record:
        record_samples(Path(f"{record}.{rank}"))
    for one in accident.split(";") if accident else []:
        event, at, count, number = one.rsplit(" ", 3)
        if at == rank:
            arrange(event, int(count), int(number))
    train_llm.main()


def record_samples(path):
    original = llm.LanguageModeling._batch

    def batch(self, stream, windows, update_labels):
        if stream is self.data.train:
            with path.open("a") as file:
                file.write(json.dumps([self._samples[0], list(windows)]) + "\n")
        return original(self, stream, windows, update_labels)

    llm.LanguageModeling._batch = batch


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
