"""Workers live as long as they are needed: no signal ends them, and nothing outlives its parent."""

import gc
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from stacey_dist.data.images import evaluation_batches
from tests.data.images.test_loader import CROPPED, ROOT, equal, joined, make, photos


def test_workers_ignore_signals() -> None:
    loader = make(photos(), workers=2)
    expected = [joined(make(photos()).micro_batches(position)) for position in (0, 6, 12)]
    first = loader.micro_batches(0)
    batches = [next(first)]
    workers = [worker.pid for worker in loader._loader._iterator._workers]  # type: ignore[union-attr]
    # At once: the other may not have come to anything yet. Both began with the signals blocked.
    for pid in workers:
        blocked = int(re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())[1], 16)  # type: ignore[index]
        assert all(blocked >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT))
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert equal(joined(batches), expected[0])
    for position in (6, 12):
        assert equal(joined(loader.micro_batches(position)), expected[position // 6])
    assert [worker.pid for worker in loader._loader._iterator._workers] == workers  # type: ignore[union-attr]
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGTERM, signal.SIGINT}
    loader.close()


def test_workers_end_with_their_parent() -> None:
    code = (
        "import time, torch\n"
        "from tests.data.images.test_workers import *\n"
        "torch.utils.data._utils.worker.MP_STATUS_CHECK_INTERVAL = 0.5\n"  # of 5 seconds
        "loader = make(photos(), workers=2)\n"
        "list(loader.micro_batches(0))\n"
        "print(*[worker.pid for worker in loader._loader._iterator._workers], flush=True)\n"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        workers = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(workers) == 2
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
