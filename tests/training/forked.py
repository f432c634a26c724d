"""`accelerate launch` in little time: processes forked from a server that has the imports done."""

import functools
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.shared import made_once
from tests.training.hidden import HIDDEN, OFFLINE

ROOT = Path(__file__).parents[2]
ACCELERATE = Path(sys.executable).with_name("accelerate")


def command(*arguments, processes=1, program="train_llm.py", engine=None, launch_options=()):
    """Return the command line that a user would type."""
    config = (engine or ("cpu" if processes == 1 else "cpu_ddp")) + ".yaml"
    launch = [str(ACCELERATE), "launch", "--config_file", str(ROOT / "configs/accelerate" / config)]
    if processes > 1:
        launch += ["--num_processes", str(processes), "--main_process_port", "0"]
    launch += map(str, launch_options)
    return [*launch, str(ROOT / program), *map(str, arguments)]


def environment(device="cpu"):
    if device == "cpu":
        return {**os.environ, **HIDDEN}
    return {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"} | OFFLINE


class Forked:
    """Processes that run a program as `accelerate launch` starts it, in the environment that it gives them."""

    def __init__(self, *arguments, program="train_llm.py", processes=1, engine=None, **variables):
        self.output = tempfile.NamedTemporaryFile("r", suffix=".txt")  # noqa: SIM115
        launched = {} if processes == 1 and engine is None else _launched_environment(engine or "cpu_ddp")
        shared = {**launched, **{name: str(value) for name, value in variables.items()}}
        if launched:
            shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "MASTER_PORT": str(_port())}
        command_line = [str(ROOT / program), *map(str, arguments)]
        self.processes = []
        for rank in range(processes):
            ranked = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if launched else shared
            process = server().Process(target=_run, args=(command_line, self.output.name, ranked))
            process.start()
            self.processes.append(process)

    def alive(self):
        return all(process.is_alive() for process in self.processes)

    def send(self, number, rank=None):
        """Send a signal to one process, or to all."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            if process.is_alive():
                os.kill(process.pid, number)

    def wait(self, seconds=300):
        """Wait for the end; returns (output, exit status of the first process that failed, or 0).

        A process that fails takes the others with it, as it does under the launcher.
        """
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                time.sleep(0.5)  # let the others say what they have to say
                self.send(signal.SIGKILL)
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"no end after {seconds} s:\n{Path(self.output.name).read_text()[-5000:]}")
            time.sleep(0.005)
        codes = [process.exitcode for process in self.processes]
        with self.output as file:
            own = [code for code in codes if code not in (0, -signal.SIGKILL)]
            return file.read(), (own or [code for code in codes if code] or [0])[0]


def _save_environment(directory, engine):
    launch = command(directory / "saved", processes=2, engine=engine, program="tests/training/save_environment.py")
    subprocess.run(launch, env=environment(), check=True, capture_output=True)
    return json.loads((directory / "saved.0").read_text())


@functools.cache
def _launched_environment(engine):
    """Return what `accelerate launch` sets for a process."""
    launched = made_once(_save_environment, engine)
    changed = {name: value for name, value in launched.items() if os.environ.get(name) != value}
    return {name: value for name, value in changed.items() if not name.startswith(("TORCHELASTIC_", "PYTEST_"))}


def _port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@functools.cache
def server():
    """Return a multiprocessing context, whose processes have the imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.preload_imports"])
    return context


def _run(command_line, output, variables):
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    sys.argv = command_line
    runpy.run_path(sys.argv[0], run_name="__main__")
