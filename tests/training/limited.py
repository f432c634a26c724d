"""train_llm.py under a limit of the process from one update to another: LIMIT="FSIZE FIRST LAST", or NOFILE."""

import os
import resource
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist.training import engine
from stacey_dist.training.launchers import LLM

name, first, last = os.environ["LIMIT"].split()
number = getattr(resource, f"RLIMIT_{name}")
usual = resource.getrlimit(number)
original = engine.Engine.finish_update
updates = [0]


def finish_update(*arguments):
    updates[0] += 1
    if updates[0] == int(first):
        # Smaller than a checkpoint's file; or the files that are open now and no other.
        lower = 20_000 if name == "FSIZE" else max(map(int, os.listdir("/proc/self/fd"))) + 1
        if name == "NOFILE":
            for descriptor in range(lower):  # a lower number must not be free
                try:
                    os.fstat(descriptor)
                except OSError:
                    os.open(os.devnull, os.O_RDONLY)
        resource.setrlimit(number, (lower, usual[1]))
    elif updates[0] == int(last):
        resource.setrlimit(number, usual)
    return original(*arguments)


if __name__ == "__main__":
    engine.Engine.finish_update = finish_update
    LLM.main()
