"""SIGTERM and Ctrl-C end a run in time, and its children with it, whatever the main process waits for."""

import re
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.ended import still_running
from tests.training.forked import Forked
from tests.training.helpers import write_config

pytestmark = pytest.mark.slow
PROGRAM = "tests/training/waiting.py"
# Less than the 30 seconds after which schedulers kill, with room for a busy machine.
IN_TIME = 28


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("stopping"))


def wait_for(path, text, alive):
    deadline = time.monotonic() + 200
    while text not in Path(path).read_text():
        assert alive(), Path(path).read_text()
        assert time.monotonic() < deadline, Path(path).read_text()
        time.sleep(0.02)


def stop(config, run, kind, place, number=signal.SIGTERM, then=None, **variables):
    """Start a run that waits, send it a signal; return (output, exit status, seconds until the end)."""
    arguments = ("--config", config, "--run_dir", run)
    variables |= {"KIND": kind, "PLACE": place, "LOCK": run.parent / "lock"}
    group = Forked(*arguments, program=PROGRAM, engine="cpu_ddp", **variables)
    wait_for(group.output.name, "waiting\n", group.alive)
    time.sleep(0.5)
    sent = time.monotonic()
    group.send(number)
    if then is not None:
        time.sleep(then[0])
        group.send(then[1])
    try:
        output, status = group.wait(60)
    finally:
        group.send(signal.SIGKILL)
    children = [int(pid) for pid in re.findall(r"^child (\d+)$", output, re.MULTILINE)]
    assert not still_running([psutil.Process(pid) for pid in children if psutil.pid_exists(pid)], 5)
    return output, status, time.monotonic() - sent


# (what the main thread waits in, where, whether its stack is told: it did not end by itself)
WAITS = [
    ("child", "data preparation", False),
    ("fifo", "data preparation", False),
    pytest.param("lock", "data preparation", False, marks=pytest.mark.exhaustive),
    pytest.param("c", "model", True, marks=pytest.mark.exhaustive),
    ("child", "engine", False),
    pytest.param("python", "update", True, marks=pytest.mark.exhaustive),
    ("c", "update", True),
    pytest.param("child", "update", True, marks=pytest.mark.exhaustive),
    pytest.param("lock", "update", True, marks=pytest.mark.exhaustive),
    ("python", "save", True),
    pytest.param("python", "evaluation", True, marks=pytest.mark.exhaustive),
    ("c", "export", True),
]


@pytest.mark.parametrize(("kind", "place", "told"), WAITS)
def test_sigterm_ends_a_run_in_time(config, tmp_path, kind, place, told):
    output, status, seconds = stop(config, tmp_path / "run", kind, place, PATIENCE=4)
    assert status == 128 + signal.SIGTERM, output
    assert seconds < IN_TIME
    said = [line for line in output.splitlines() if line.startswith("SIGTERM: stopped")]
    assert len(said) == 1, output
    assert said[0].startswith("SIGTERM: stopped in ") == told, output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("kind", "place"), [("python", "model"), pytest.param("c", "model", marks=pytest.mark.exhaustive), ("c", "update")]
)
def test_two_ctrl_c_end_a_run_at_once(config, tmp_path, kind, place):
    output, status, seconds = stop(config, tmp_path / "run", kind, place, signal.SIGINT, then=(1.5, signal.SIGINT))
    assert status == 128 + signal.SIGINT, output
    assert seconds < 15
    assert "Traceback" not in output


def test_a_second_sigterm_later_on_ends_a_run_at_once(config, tmp_path):
    output, status, seconds = stop(config, tmp_path / "run", "c", "update", then=(6, signal.SIGTERM))
    assert status == 128 + signal.SIGTERM, output
    assert seconds < 12
    assert "without a save" in output


def test_a_collective_that_another_process_does_not_come_to(config, tmp_path):
    how = dict(program=PROGRAM, processes=2, KIND="collective", PLACE="update", COUNT=3)
    group = Forked("--config", config, "--run_dir", tmp_path / "run", **how)
    log = Path(group.output.name)
    while log.read_text().count("waiting\n") < 2:
        assert group.alive(), log.read_text()
        time.sleep(0.05)
    sent = time.monotonic()
    group.send(signal.SIGTERM)
    while any(process.is_alive() for process in group.processes):
        assert time.monotonic() - sent < 30, log.read_text()  # torchrun's agent waits no longer
        time.sleep(0.05)
    output, status = group.wait()
    assert status != 0
    # On a loaded machine, one stops so much before the other that the other is told of it first.
    stopped = re.findall(r"^rank (\d): SIGTERM: stopped in ", output, re.MULTILINE)
    assert sorted(stopped) == ["0", "1"] or (len(stopped) == 1 and "stopped answering" in output), output


def test_a_save_that_goes_on_is_not_cut_short(tmp_path):
    """Bytes that are written count as progress, and nothing else does: in a save, or in the wait for an earlier one."""
    code = (
        "import os, signal, sys, threading, time\n"
        "from types import SimpleNamespace\n"
        "from stacey_dist.training.saving import Saver\n"
        "from stacey_dist.training.processes import signals\n"
        "signals._PATIENCE_SECONDS = 1.0\n"
        "def write():\n"
        "    for _ in range(20):\n"
        "        time.sleep(0.2)\n"
        "        os.write(file, bytes(100_000))\n"
        "    print('saved', flush=True)\n"
        "    time.sleep(100 if sys.argv[2] == 'then hangs' else 0)\n"
        "file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)\n"
        "def begin(*_):\n"
        "    thread = threading.Thread(target=write, daemon=True)\n"
        "    thread.start()\n"
        "    thread.join()\n"
        "with signals.listening(), signals.StopSignal():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    Saver.save(SimpleNamespace(_begin=begin, settings=SimpleNamespace(asynchronous=True)), None)\n"
    )
    program = tmp_path / "program.py"
    program.write_text(code)
    started = {then: Forked(tmp_path / then, then, program=program) for then in ("ends", "then hangs")}
    for then, status in (("ends", 0), ("then hangs", 128 + signal.SIGTERM)):
        output, found = started[then].wait(50)
        assert "saved" in output
        assert found == status, output
        assert ("SIGTERM: stopped in " in output) == (status != 0)
