"""One run at a time in a directory."""

import functools
import gc
import socket
import subprocess
import sys

import pytest

from stacey_dist.errors import SettingsError
from stacey_dist.training import run_lock
from stacey_dist.training.run_lock import acquire_run_lock
from tests.training.forked import ROOT

# Takes the directory and keeps it until its standard input is closed; or is killed.
PROGRAM = """if True:
    import sys
    from pathlib import Path
    from stacey_dist.training.run_lock import acquire_run_lock
    file = acquire_run_lock(Path(sys.argv[1]))
    print("taken", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that trains there."""
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def test_a_second_run_waits_and_is_refused(other, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_lock, "_PATIENCE_HERE_SECONDS", 0.5)
    holder = f"process {other.pid} on {socket.gethostname()}"
    with pytest.raises(SettingsError, match=f"run_dir: {tmp_path} is in use by {holder}; give another --run_dir"):
        acquire_run_lock(tmp_path)
    assert f"{holder} trains in {tmp_path}; waiting for its end" in capsys.readouterr().err


def test_a_cell_that_runs_again_keeps_the_lock(tmp_path):
    first = acquire_run_lock(tmp_path)
    second = acquire_run_lock(tmp_path)
    del first
    gc.collect()
    program = f"import fcntl; fcntl.lockf(open({str(tmp_path / '.lock')!r}, 'a+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    run = functools.partial(subprocess.run, [sys.executable, "-c", program], capture_output=True, text=True)
    assert "BlockingIOError" in run().stderr
    second.close()
    assert run().returncode == 0
    with acquire_run_lock(tmp_path) as third:
        assert third is not second


def test_it_goes_on_where_the_first_was_killed(other, tmp_path, capsys):
    other.kill()
    with acquire_run_lock(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text().startswith("process ")
    assert str(other.pid) not in (tmp_path / ".lock").read_text()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "lockf", refuse)
    with acquire_run_lock(tmp_path):
        assert "no lock can be taken there (No locks available)" in capsys.readouterr().out
