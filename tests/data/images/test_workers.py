"""Workers live as long as they are needed: no signal ends them, nothing outlives its parent or waits for ever."""

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from stacey_dist.data.images import ArrayImages, ImageLoader, check_shared_memory, evaluation_batches, workers
from stacey_dist.errors import SettingsError, StoppedWaitingError
from tests.data.images.test_loader import CROPPED, ROOT, equal, joined, make, photos


def test_workers_ignore_signals() -> None:
    loader = make(photos(), workers=2)
    expected = [joined(make(photos()).micro_batches(position)) for position in (0, 6, 12)]
    first = loader.micro_batches(0)
    batches = [next(first)]
    workers = [worker.pid for worker in loader._workers.processes]
    # At once: the other may not have come to anything yet. Both began with the signals blocked.
    for pid in workers:
        blocked = int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)  # type: ignore[index]
        assert all(blocked >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT))
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert equal(joined(batches), expected[0])
    for position in (6, 12):
        assert equal(joined(loader.micro_batches(position)), expected[position // 6])
    assert [worker.pid for worker in loader._workers.processes] == workers
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT}
    loader.close()


def test_workers_end_with_their_parent() -> None:
    code = (
        "import time, torch\n"
        "from tests.data.images.test_workers import *\n"
        "loader = make(photos(), workers=2)\n"
        "list(loader.micro_batches(0))\n"
        "print(*[worker.pid for worker in loader._workers.processes], flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        workers[0].suspend()  # it cannot look for its parent
        parent.kill()
    _, alive = psutil.wait_procs(workers, timeout=15)
    # Where nobody waits for orphans they stay as zombies.
    assert all(worker.status() == psutil.STATUS_ZOMBIE for worker in alive)


def leave_workers_running() -> None:
    loader = make(photos(), workers=2)
    list(loader.micro_batches(0))
    batches = evaluation_batches(photos(), CROPPED, batch_size=2, workers=1)
    next(batches)
    assert len(psutil.Process().children()) == 3
    sys.modules["kept"] = loader, batches  # type: ignore[assignment]


def test_a_process_that_fails_ends_with_its_workers() -> None:
    """Both as a program and as a child of multiprocessing, which end in different ways."""
    code = (
        "import multiprocessing.util\n"  # before torch: then it is called at exit after torch
        "from tests.data.images.test_workers import *\n"
        "child = multiprocessing.get_context('fork').Process(target=leave_workers_running)\n"
        "child.start()\n"
        "child.join(10)\n"
        "assert child.exitcode == 0\n"
        "leave_workers_running()\n"
        "raise RuntimeError('failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: failed"


def test_a_forgotten_loader_ends_its_workers() -> None:
    before = set(psutil.Process().children())
    loader = make(photos(), workers=1)
    list(loader.micro_batches(0))
    del loader
    gc.collect()
    assert set(psutil.Process().children()) <= before


class Hanging(ArrayImages):
    """As on a disk that does not answer."""

    def read(self, i: int) -> Any:
        time.sleep(1000)


HANGING = Hanging(np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, int), ["a"])


def suspended(**options: Any) -> ImageLoader:
    loader = make(photos(), workers=2, prefetch=1, **options)
    list(loader.micro_batches(0))
    for worker in loader._workers.processes:
        os.kill(worker.pid, signal.SIGSTOP)
    return loader


def wait_for_ever(loader: ImageLoader) -> None:
    for position in range(6, 600, 6):  # some were prepared before
        list(loader.micro_batches(position))


def assert_that_workers_end(loader: ImageLoader) -> None:
    running = [psutil.Process(worker.pid) for worker in loader._workers.processes if worker.is_alive()]
    assert running
    loader.close()
    assert not psutil.wait_procs(running, timeout=5)[1]


@pytest.mark.parametrize("make_loader", [lambda **o: make(HANGING, workers=2, **o), suspended])
def test_a_batch_that_does_not_come_is_an_error(make_loader: Any) -> None:
    loader = make_loader(timeout=1)
    with pytest.raises(SettingsError, match=r"^data\.timeout_seconds: no batch came .* within 1 s; [^\n]*$"):
        wait_for_ever(loader)
    assert_that_workers_end(loader)


def test_a_start_elsewhere_does_not_wait_for_ever() -> None:
    loader = suspended(timeout=1)
    with pytest.raises(SettingsError, match=r"^data\.timeout_seconds"):
        list(loader.micro_batches(60))
    assert_that_workers_end(loader)


@pytest.mark.parametrize("make_loader", [lambda **o: make(HANGING, workers=2, **o), suspended])
def test_who_is_told_to_stop_does_not_wait_for_ever(make_loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_STOP_SECONDS", 0.5)
    loader = make_loader(stopping=lambda: True)
    with pytest.raises(StoppedWaitingError, match="told to stop"):
        wait_for_ever(loader)
    assert_that_workers_end(loader)
    batches = evaluation_batches(HANGING, CROPPED, batch_size=2, workers=1, stopping=lambda: True)
    before = set(psutil.Process().children())
    with pytest.raises(StoppedWaitingError, match="told to stop"):
        next(batches)
    assert set(psutil.Process().children()) <= before


def test_who_is_told_to_stop_gets_the_batches_that_come() -> None:
    loader = make(photos(), workers=1, stopping=lambda: True)
    assert equal(joined(loader.micro_batches(6)), joined(make(photos()).micro_batches(6)))
    loader.close()


def test_a_killed_worker_is_an_error() -> None:
    loader = make(photos(), workers=2)
    list(loader.micro_batches(0))
    handler = signal.getsignal(signal.SIGCHLD)
    killed = loader._workers.processes[1].pid
    os.kill(killed, signal.SIGKILL)
    time.sleep(0.5)  # nothing is raised where nothing waits for a batch
    message = rf"^data\.workers: worker process {killed} was killed by SIGKILL; where the system did so [^\n]*$"
    with pytest.raises(SettingsError, match=message):
        wait_for_ever(loader)
    assert_that_workers_end(loader)
    assert signal.getsignal(signal.SIGCHLD) is handler
    assert equal(joined(loader.micro_batches(6)), joined(make(photos()).micro_batches(6)))
    loader.close()


@pytest.mark.parametrize(
    "batches",
    ["make(photos(), workers=2).micro_batches(0)", "evaluation_batches(photos(), CROPPED, batch_size=6, workers=2)"],
)
def test_no_room_in_shared_memory_is_an_error(batches: str) -> None:
    code = (
        "import resource\n"
        "from tests.data.images.test_workers import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"  # of files, those of shared memory too
        f"try: list({batches})\n"
        "except SettingsError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert re.search(r"^data\.workers: no room for a batch of 0\.0 MB \([^\n]*\); give the container more", done.stdout)
    assert done.returncode == 0, done.stderr


def test_shared_memory_is_compared_with_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    # As in a container of Docker: 64 MB.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    batch = 256 * 224 * 224 * 3
    check_shared_memory(0, 4, batch, 1)
    check_shared_memory(1, 4, (64 << 20) // 8, 1)
    with pytest.raises(
        SettingsError,
        match=r"^data\.workers: 8 worker processes of 2 processes each, 4 batches ahead \(data\.prefetch\) of "
        r"38\.5 MB, need 4,932\.5 MB of /dev/shm, where 67\.1 MB are free; .*--shm-size.* or set data\.workers: 0$",
    ):
        check_shared_memory(8, 4, batch, 2)
    with pytest.raises(SettingsError, match=r"data\.workers: 1 worker processes, 4 batches"):
        check_shared_memory(1, 4, (64 << 20) // 8 + 1, 1)
