"""Workers live as long as they are needed: no signal ends them, nothing outlives its parent or waits for ever."""

import gc
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from stacey_dist.data.images import ArrayImages, ImageLoader, Workers, evaluation_batches, workers
from stacey_dist.errors import InputError, StoppedWaitingError
from tests.data.images.test_loader import CROPPED, ROOT, children, equal, joined, make, photos
from tests.ended import still_running


def test_workers_ignore_signals() -> None:
    before = children()
    loader = make(photos(), workers=Workers(2))
    expected = [joined(make(photos()).micro_batches(position)) for position in (0, 6, 12)]
    first = loader.micro_batches(0)
    batches = [next(first)]
    workers = children() - before
    # At once: the other may not have come to anything yet. Both began with the signals blocked.
    for pid in [worker.pid for worker in workers]:
        blocked = int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)  # type: ignore[index]
        assert all(blocked >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT))
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert equal(joined(batches), expected[0])
    for position in (6, 12):
        assert equal(joined(loader.micro_batches(position)), expected[position // 6])
    assert children() - before == workers
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT}
    loader.close()


def test_workers_end_with_their_parent() -> None:
    code = (
        "import time, torch\n"
        "from tests.data.images.test_workers import *\n"
        "loader = make(photos(), workers=Workers(2), micro_batch_size=3)\n"
        "list(loader.micro_batches(0))\n"  # one of each worker, so both have told the system what ends them
        "print(*[worker.pid for worker in children()], flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
        workers[0].suspend()  # it cannot look for its parent
        parent.kill()
    assert not still_running(workers, 15)


def leave_workers_running() -> None:
    loader = make(photos(), workers=Workers(2))
    list(loader.micro_batches(0))
    batches = evaluation_batches(photos(), CROPPED, batch_size=2, workers=Workers(1))
    next(batches)
    assert len(children()) == 3
    sys.modules["kept"] = loader, batches  # type: ignore[assignment]


def test_a_process_that_fails_ends_with_its_workers() -> None:
    """Both as a program and as a child of multiprocessing, which end in different ways."""
    code = (
        "import multiprocessing.util\n"  # before torch: then it is called at exit after torch
        "from tests.data.images.test_workers import *\n"
        "child = multiprocessing.get_context('fork').Process(target=leave_workers_running)\n"
        "child.start()\n"
        "child.join(100)\n"
        "assert child.exitcode == 0\n"
        "leave_workers_running()\n"
        "raise RuntimeError('failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: failed"


def test_the_error_of_a_process_that_cannot_start_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(process: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers.FORK.Process, "start", fail)
    with pytest.raises(BlockingIOError, match="Resource temporarily unavailable"):
        list(make(photos(), workers=Workers(1)).micro_batches(0))


def test_a_forgotten_loader_ends_its_workers() -> None:
    before = children()
    loader = make(photos(), workers=Workers(1))
    list(loader.micro_batches(0))
    del loader
    gc.collect()
    assert children() <= before


class Hanging(ArrayImages):
    """As on a disk that does not answer."""

    def read(self, i: int) -> Any:
        time.sleep(1000)


HANGING = Hanging(np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, int), ["a"])


def suspended(**options: Any) -> ImageLoader:
    before = children()
    loader = make(photos(), workers=Workers(2, prefetch=1, **options))
    list(loader.micro_batches(0))
    for worker in children() - before:
        worker.suspend()
    return loader


def hanging(**options: Any) -> ImageLoader:
    return make(HANGING, workers=Workers(2, **options))


def wait_for_ever(loader: ImageLoader) -> None:
    for position in range(6, 600, 6):  # some were prepared before
        list(loader.micro_batches(position))


def assert_that_workers_end(loader: ImageLoader, before: set[psutil.Process]) -> None:
    loader.close()
    assert children() <= before


@pytest.mark.parametrize("make_loader", [hanging, suspended])
def test_a_batch_that_does_not_come_is_an_error(make_loader: Any) -> None:
    before = children()
    loader = make_loader(timeout=1)
    with pytest.raises(InputError, match=r"^timeout: no batch came .* within 1 s; [^\n]*$"):
        wait_for_ever(loader)
    assert_that_workers_end(loader, before)


def test_a_start_elsewhere_does_not_wait_for_workers_that_hang() -> None:
    before = children()
    loader = suspended(timeout=1)
    assert equal(joined(loader.micro_batches(60)), joined(make(photos()).micro_batches(60)))
    assert_that_workers_end(loader, before)


@pytest.mark.parametrize("make_loader", [hanging, suspended])
def test_who_is_asked_to_stop_does_not_wait_for_ever(make_loader: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_STOP_SECONDS", 0.5)
    before = children()
    loader = make_loader(stopping=lambda: True)
    with pytest.raises(StoppedWaitingError, match="asked to stop"):
        wait_for_ever(loader)
    assert_that_workers_end(loader, before)
    batches = evaluation_batches(HANGING, CROPPED, batch_size=2, workers=Workers(1, stopping=lambda: True))
    with pytest.raises(StoppedWaitingError, match="asked to stop"):
        next(batches)
    assert children() <= before


def test_who_is_asked_to_stop_gets_the_batches_that_come() -> None:
    loader = make(photos(), workers=Workers(1, stopping=lambda: True))
    assert equal(joined(loader.micro_batches(6)), joined(make(photos()).micro_batches(6)))
    loader.close()


def test_a_killed_worker_is_an_error() -> None:
    before = children()
    loader = make(photos(), workers=Workers(2))
    list(loader.micro_batches(0))
    killed = max(children() - before, key=lambda process: process.pid)
    killed.kill()
    time.sleep(0.5)  # nothing is raised where nothing waits for a batch
    message = rf"^workers: worker process {killed.pid} was killed by SIGKILL; where the system did so [^\n]*$"
    with pytest.raises(InputError, match=message):
        wait_for_ever(loader)
    assert_that_workers_end(loader, before)
    assert equal(joined(loader.micro_batches(6)), joined(make(photos()).micro_batches(6)))
    loader.close()


class Failing(ArrayImages):
    def read(self, i: int) -> Any:
        raise LookupError("a mistake in the program")


def test_a_worker_that_fails_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    images = Failing(np.zeros((9, 8, 8, 3), np.uint8), np.zeros(9, int), ["a"])
    loader = make(images, workers=Workers(1))
    with pytest.raises(InputError, match=r"^workers: worker process \d+ ended with status 1$"):
        list(loader.micro_batches(0))
    loader.close()
    assert "LookupError: a mistake in the program" in capfd.readouterr().err


def test_batches_take_no_room_in_shared_memory() -> None:
    code = (
        "import resource\n"
        "from tests.data.images.test_workers import *\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"  # of files, those of shared memory too
        "for batches in (\n"
        "    make(photos(), workers=Workers(2)).micro_batches(0),\n"
        "    evaluation_batches(photos(), CROPPED, batch_size=6, workers=Workers(2)),\n"
        "): print(sum(len(batch.labels) for batch in batches))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=250)
    assert done.stdout == "6\n13\n", done.stderr


def test_more_batches_than_there_is_memory_for_are_an_error() -> None:
    message = (
        r"^prefetch: 1000000000 batches of 38\.5 MB for each of 8 worker processes are more than there is memory for; "
        "lower it, `workers` or `micro_batch_size`$"
    )
    with pytest.raises(InputError, match=message):
        Workers(8, prefetch=10**9).check_memory(256, 224)
    with pytest.raises(InputError, match=r"^prefetch"):
        Workers(1, prefetch=10**30).check_memory(1, 1)
    Workers(0, prefetch=10**9).check_memory(256, 224)
    Workers(2, prefetch=4).check_memory(16, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(count=-1), "workers: -1 is not allowed; it must be at least 0"),
        (dict(prefetch=0), "prefetch: 0 is not allowed; it must be at least 1"),
        (dict(timeout=0), "timeout: 0 is not allowed; it must be above 0"),
    ],
)
def test_bad_settings(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        Workers(**change)
