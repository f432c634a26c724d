"""`accelerate launch` in little time: processes forked from a server that has the imports done."""

import functools
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import runpy
import signal
import socket
import sys
import tempfile
import time
import unittest.mock
from pathlib import Path

from stacey_dist.files import replace_file
from tests.shared import locked
from tests.training.hidden import HIDDEN, OFFLINE

ROOT = Path(__file__).parents[2]
ACCELERATE = Path(sys.executable).with_name("accelerate")
CONFIGS = ROOT / "configs/accelerate"


def command(*arguments, processes=1, program="train_llm.py", engine=None, launch_options=()):
    """Return the command line that a user would type."""
    config = (engine or ("cpu" if processes == 1 else "cpu_ddp")) + ".yaml"
    launch = [str(ACCELERATE), "launch", "--config_file", str(CONFIGS / config)]
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
        launched = {} if processes == 1 and engine is None else launch_environment(engine or "cpu_ddp")
        shared = {**launched, **{name: str(value) for name, value in variables.items()}}
        if launched:
            shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(processes))
            shared |= {"GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
            shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_port())}
        command_line = [str(ROOT / program), *map(str, arguments)]
        self.processes = []
        for rank in range(processes):
            ranked = shared | dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)) if launched else shared
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


@functools.cache
def launch_environment(name, processes=2):
    """Return what `accelerate launch` sets for each of several processes, but for their numbers and addresses."""
    from accelerate.commands.launch import launch_command, launch_command_parser

    found = {}

    def start(parsed):  # in place of torchrun's own function
        found.update({key: value for key, value in os.environ.items() if key not in HIDDEN})
        found.setdefault("OMP_NUM_THREADS", "1")
        found.update(ROLE_NAME=parsed.role, TORCH_NCCL_ASYNC_ERROR_HANDLING="1")

    options = ["--config_file", str(CONFIGS / f"{name}.yaml"), "--num_processes", str(processes)]
    options += ["--num_machines", "1", "--main_process_port", "0"]
    if name == "hsdp":
        options += ["--parallelism_config_dp_shard_size", str(processes // 2)]
    alone = unittest.mock.patch.dict(os.environ, HIDDEN, clear=True)
    with alone, unittest.mock.patch("torch.distributed.run.run", start):
        launch_command(launch_command_parser().parse_args([*options, "train_llm.py"]))
    others = {"PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    return {key: value for key, value in found.items() if key not in others}


def _port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _join_the_fork_server():
    """Let this process's children be forked from the server of all of pytest's processes; start it if there is none.

    Its imports take 12 seconds, and 600 MB. What is private to multiprocessing is where a process finds its server.
    """
    if _runs(_OWN._forkserver_pid):
        return
    with locked("fork-server") as path:
        try:
            state = pickle.loads(path.read_bytes())
            if not _runs(state["_forkserver_pid"]):
                raise FileNotFoundError
            # It ends when nobody has the other end of this pipe open any more.
            pipe = f"/proc/{state.pop('process')}/fd/{state['_forkserver_alive_fd']}"
            state |= {"_forkserver_alive_fd": os.open(pipe, os.O_WRONLY)}
        except FileNotFoundError:  # nobody has started it, or all that used it have ended
            multiprocessing.set_forkserver_preload(["tests.training.preload_imports"])
            _OWN._forkserver_pid = None
            environ = _ENVIRONMENT | {"SHARED_BY_WORKERS": str(path.parent)}  # whatever this test has changed
            with unittest.mock.patch.dict(os.environ, environ, clear=True):
                _start_a_fork_server()
            state = {name: value for name, value in vars(_OWN).items() if name.startswith("_forkserver_")}
        vars(_OWN).update(state)
        replace_file(path, pickle.dumps(state | {"process": os.getpid()}))


def _runs(number):
    """Return whether a process runs. One that has ended may still be listed, until its parent has waited for it."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


_ENVIRONMENT = dict(os.environ)
_OWN = multiprocessing.forkserver._forkserver
_start_a_fork_server = _OWN.ensure_running
# So do the package's own users of multiprocessing's fork server, whatever they preload.
_OWN.ensure_running = _join_the_fork_server


def server():
    """Return a multiprocessing context, whose processes have the imports done."""
    return multiprocessing.get_context("forkserver")


def _run(command_line, output, variables):
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(variables)
    sys.argv = command_line
    sys.path.insert(0, str(Path(command_line[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
