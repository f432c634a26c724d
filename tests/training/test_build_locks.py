"""Locks of compilers: those whose process was killed are removed, others are waited for, and each wait is told."""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.utils.file_baton import FileBaton

from stacey_dist.errors import SettingsError
from stacey_dist.training.processes import build_locks

OWNER = (
    "import sys, time\n"
    "from torch.utils.file_baton import FileBaton\n"
    "assert FileBaton(sys.argv[1]).try_acquire()\n"
    "print('compiling', flush=True)\n"
    "time.sleep(1000)\n"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(FileBaton, "wait", FileBaton.wait)  # put back afterwards
    monkeypatch.setattr(build_locks, "_JUST_MADE_SECONDS", 0.0)
    (tmp_path / "deepspeed_helper").mkdir()
    return tmp_path


@pytest.fixture
def owner(cache):
    """Yield a process that compiles: it holds the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, lock_of(cache)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "compiling\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def lock_of(cache):
    return cache / "deepspeed_helper" / "lock"


def end(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_lock_is_removed_when_its_owner_was_killed_and_not_before(cache, owner, capsys):
    build_locks.watch()
    assert lock_of(cache).exists()
    assert capsys.readouterr().err == ""
    end(owner)
    assert lock_of(cache).exists()
    build_locks.watch()
    assert not lock_of(cache).exists()
    assert f"{lock_of(cache)}: removed" in capsys.readouterr().err
    assert FileBaton(str(lock_of(cache))).try_acquire()


def test_a_wait_is_told_and_ends_with_the_owner(cache, owner, capsys, monkeypatch):
    monkeypatch.setattr(build_locks, "_SAY_AFTER_SECONDS", 0.2)
    monkeypatch.setattr(build_locks, "_LOOK_EVERY_SECONDS", 0.5)
    build_locks.watch()
    looked = []

    def sleep(seconds, sleep=time.sleep):
        looked.append(capsys.readouterr().err)
        if "waiting for" in looked[-1]:
            end(owner)
        sleep(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(SettingsError, match="lock: the process that compiled there ended before it was done"):
        FileBaton(str(lock_of(cache))).wait()
    assert f"waiting for {lock_of(cache)}: process {owner.pid} compiles there\n" in looked
    assert not lock_of(cache).exists()


def test_a_wait_ends_when_the_lock_is_given_back(cache):
    build_locks.watch()
    baton = FileBaton(str(lock_of(cache)))
    assert baton.try_acquire()
    baton.release()
    FileBaton(str(lock_of(cache))).wait()


def test_on_a_file_system_that_others_may_share_only_a_very_old_lock_is_removed(cache, monkeypatch):
    monkeypatch.setattr(build_locks, "_file_system", lambda path: "nfs4")
    lock_of(cache).touch()
    build_locks.watch()
    assert lock_of(cache).exists()
    os.utime(lock_of(cache), (time.time() - 7200,) * 2)
    build_locks.watch()
    assert not lock_of(cache).exists()


def test_a_lock_that_was_just_made_stays(cache, monkeypatch):
    monkeypatch.setattr(build_locks, "_JUST_MADE_SECONDS", 2.0)
    lock_of(cache).touch()
    build_locks.watch()
    assert lock_of(cache).exists()


def test_the_file_system_of_a_path(tmp_path):
    assert build_locks._file_system(tmp_path / "proc") not in ("", "proc")
    assert build_locks._file_system(build_locks.Path("/proc/self/status")) == "proc"
