"""train_llm.py, which waits for good after it has written "waiting" to standard output.

KIND is one of `KINDS`. PLACE is the function before which it waits, when that is called for the COUNTth time (1).
PATIENCE is how many seconds a signal gives it to go on, if not those of the launcher.
"""

import ctypes
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from stacey_dist.checkpoint import background
from stacey_dist.data import lock
from stacey_dist.training import engine, loop
from stacey_dist.training.launchers import LLM
from stacey_dist.training.processes import signals
from stacey_dist.training.tasks import llm, llm_model, text_data


def say():
    os.write(1, b"waiting\n")


def in_python():
    say()
    threading.Event().wait()


def in_c_code():
    """Wait in a C function that no signal interrupts, while Python's other threads run."""
    say()
    mutex = (ctypes.c_char * 64)()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def in_a_lock():
    """Wait for a lock that another process holds."""
    path = Path(os.environ["LOCK"])
    holder = subprocess.Popen(["flock", path, "sleep", "1000"])
    while subprocess.run(["flock", "-n", path, "true"]).returncode == 0:
        time.sleep(0.01)
    os.write(1, f"child {holder.pid}\n".encode())
    say()
    with lock.locked(path):
        pass


def in_a_child():
    """Wait for a compiler that does not end, and does not listen to SIGTERM."""
    child = subprocess.Popen(["sh", "-c", "trap '' TERM INT; sleep 1000 & wait; sleep 1000"])
    os.write(1, f"child {child.pid}\n".encode())
    say()
    child.wait()


def in_a_fifo():
    os.mkfifo(os.environ["LOCK"])
    say()
    open(os.environ["LOCK"]).close()


def in_a_collective():
    """Wait in a collective that the other rank, which hangs elsewhere, does not join."""
    if os.environ.get("RANK") == "1":
        in_c_code()
    say()
    torch.distributed.all_reduce(torch.ones(1))


KINDS = {
    "python": in_python,
    "c": in_c_code,
    "lock": in_a_lock,
    "child": in_a_child,
    "fifo": in_a_fifo,
    "collective": in_a_collective,
}
PLACES = {
    "data preparation": (text_data, "tokenize"),
    "model": (llm_model, "new_model"),
    "engine": (engine, "build_engine"),
    "update": (llm.LanguageModeling, "loss"),
    "evaluation": (loop, "_evaluate"),
    "save": (background, "write"),
    "export": (llm, "export"),
}


def main():
    signals._PATIENCE_SECONDS = float(os.environ.get("PATIENCE", signals._PATIENCE_SECONDS))
    place, name = PLACES[os.environ["PLACE"]]
    original, calls = getattr(place, name), []

    def waits(*arguments, **options):
        calls.append(1)
        if len(calls) == int(os.environ.get("COUNT", "1")):
            KINDS[os.environ["KIND"]]()
        return original(*arguments, **options)

    setattr(place, name, waits)
    LLM.main()


if __name__ == "__main__":
    main()
