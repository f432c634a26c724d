"""A process that dies, hangs or fails is named in one line, and the others stop; nobody else is taken for dead."""

import os
import resource
import signal
import socket
import subprocess
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from stacey_dist.checkpoint.compare import differences
from stacey_dist.errors import SettingsError
from stacey_dist.training.processes import heartbeat, open_files, rendezvous
from tests.training.forked import Forked, command, environment, server
from tests.training.helpers import rows, training_rows, write_config

pytestmark = pytest.mark.slow
HOST = socket.gethostname()
TIMEOUT = 1.0


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("heartbeat"), checkpoint={"every_steps": 5})


def wait_for_step(group, run, step):
    while group.alive() and len(training_rows(run)) < step:
        time.sleep(0.005)


def named(output):
    return [line for line in output.splitlines() if "stopped answering" in line]


@pytest.mark.parametrize(
    ("rank", "number", "engine", "seconds"),
    [
        (1, signal.SIGKILL, "cpu_ddp", 120),  # a connection that ends tells at once
        (0, signal.SIGKILL, "cpu_zero2", 120),  # the store lives in process 0, and dies with it
        pytest.param(1, signal.SIGSTOP, "cpu_zero2", 2, marks=pytest.mark.exhaustive),
        (0, signal.SIGSTOP, "cpu_ddp", 2),
    ],
)
def test_training_ends_with_the_name_of_a_process_that_is_lost(config, tmp_path, rank, number, engine, seconds):
    run = tmp_path / "run"
    arguments = ("--config", config, "--run_dir", run, "--train.max_steps", 5000)
    timeout = ("--train.heartbeat_timeout_seconds", seconds)
    group = Forked(*arguments, *timeout, processes=2, engine=engine)
    wait_for_step(group, run, 3)
    group.send(number, rank)
    survivor = group.processes[1 - rank]
    survivor.join(12)
    group.send(signal.SIGKILL)
    output = Path(group.output.name).read_text()
    assert survivor.exitcode == heartbeat.EXIT_STATUS, output
    assert "Traceback" not in output
    # A store that dies in the middle of an answer, which is rare, makes its client print one stack of C++.
    assert output.count("frame #0") <= (rank == 0 and number == signal.SIGKILL)
    if (rank, number) != (0, signal.SIGSTOP):  # there the store hangs too, and the host's first process says it
        (line,) = named(output)
        assert line.startswith(f"rank {rank} on {HOST}")


def beat(scenario, rank, processes, port, output, timeout):
    """Run a process of a run without training."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 2)
    os.environ["LOCAL_RANK"] = str(rank)
    scenario(rank, heartbeat.Heartbeat(rank, processes, timeout, ("127.0.0.1", port)))


def beat_together(scenario, processes=3, disturb=lambda started, stores: None, timeout=TIMEOUT):
    """Return exit statuses, and what was printed."""
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))]
    with tempfile.NamedTemporaryFile("r") as output:
        arguments = (processes, stores[0].port, output.name, timeout)
        started = [server().Process(target=beat, args=(scenario, rank, *arguments)) for rank in range(processes)]
        for process in started:
            process.start()
        disturb(started, stores)
        for process in started:
            process.join(20)
        return [process.exitcode for process in started], output.read()


def ends_at_its_own_time(rank, own):
    time.sleep((2, 0, 1)[rank] * 1.3 * TIMEOUT)
    own.stop()


def test_processes_that_end_at_different_times_are_not_taken_for_dead():
    assert beat_together(ends_at_its_own_time) == ([0, 0, 0], "")


def first_ends_first(rank, own):
    time.sleep(rank * 1.3 * TIMEOUT)
    own.stop()


def wait_until_all_beat(started, stores):
    counters = [f"stacey_dist/heartbeat_0/beat/{rank}" for rank in range(len(started))]
    while not stores[0].check(counters) or min(map(int, stores[0].multi_get(counters))) == 0:
        time.sleep(0.01)


def end_the_store_after_the_first_process(started, stores):
    wait_until_all_beat(started, stores)
    while int(stores[0].get("stacey_dist/heartbeat_0/beat/0")) < heartbeat._GOODBYE:
        time.sleep(0.01)
    time.sleep(0.5)
    stores.clear()


def test_the_first_process_may_end_first_and_take_the_store_along():
    statuses, printed = beat_together(first_ends_first, disturb=end_the_store_after_the_first_process)
    assert statuses == [0, 0, 0]
    assert "stop" not in printed  # torch may print a warning of its own, if the store ends while it answers


def pause_all(started, stores):
    time.sleep(1)
    first, *others = started  # the first process, which watches, is the last to stop and the first to wake
    for process in [*others, None, first]:
        time.sleep(0.15) if process is None else os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    for process in [first, None, *others]:
        time.sleep(0.05) if process is None else os.kill(process.pid, signal.SIGCONT)


def waits(rank, own):
    time.sleep(3 * TIMEOUT)
    own.stop()


def test_a_pause_of_all_processes_is_nobodys_death():
    assert beat_together(waits, disturb=pause_all) == ([0, 0, 0], "")


def fails(rank, own):
    time.sleep(0.1 * rank)
    error = [ValueError("this is wrong"), ValueError("this is wrong"), KeyError("another")][rank]
    os._exit(10 if own.report(error) else 11)


def test_of_several_failures_the_first_is_raised_and_others_are_a_line():
    statuses, output = beat_together(
        fails, timeout=60
    )  # a beat is a second: none hears of the others' end before its own
    assert statuses == [10, 11, 11]
    assert output == f"rank 2 on {HOST} failed: KeyError: 'another'\n"


def lost(rank, own):
    time.sleep(1)
    if rank == 1:
        time.sleep(0.2)
        os._exit(10 if own.report(ValueError("this is wrong")) else 11)
    # The launcher stops those that are left on the host.
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1")
    os._exit(10 if own.report(error) else 11)


def test_a_lost_connection_is_no_failure_of_its_own():
    assert beat_together(lost) == ([75, 10, 75], "")


def one_notices(rank, own):
    time.sleep(1.5)  # until all have begun
    if rank == 2:
        os._exit(1)
    if rank == 1:
        threading.Timer(2.5, lambda: own._watched == [0] or os._exit(12)).start()
        own.report(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"))
    time.sleep(20)


def test_the_first_process_looks_closer_when_another_has_lost_a_connection():
    statuses, output = beat_together(one_notices, timeout=60)
    assert statuses == [75, 75, 1]
    assert output.startswith(f"rank 2 on {HOST} stopped answering")


def cannot_print(rank, own):
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)  # as the launcher that has ended
    time.sleep(15)


def end_the_store(started, stores):
    wait_until_all_beat(started, stores)
    stores.clear()


def test_a_process_that_cannot_print_stops_too():
    assert beat_together(cannot_print, disturb=end_the_store) == ([75, 75, 75], "")


def times_out(rank, own):
    time.sleep(1)  # until all have begun
    if rank == 1:
        os._exit(10 if own.report(RuntimeError("[gloo] Timed out waiting 600000ms for recv")) else 11)
    time.sleep(20)


def test_a_collective_that_timed_out_among_living_processes_is_raised():
    assert beat_together(times_out) == ([75, 10, 75], "")


def test_a_line_names_ranks_by_host():
    own = object.__new__(heartbeat.Heartbeat)
    own.store = dist.HashStore()
    for rank, host in enumerate(("a", "b", "b")):
        own.store.set(f"host/{rank}", host)
    assert own._names([0]) == "rank 0 on a"
    assert own._names([0, 1, 2, 3]) == "rank 0 on a, ranks 1, 2 on b, rank 3 on an unknown host"


COUNT, SOFT = 60, 100  # of simulated processes, and a limit of open files that does not hold their connections


def check_limits(results):
    """In a process of its own: the store is here, as in process 0; then this process is the launcher of another."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, hard))
    open_files.raise_limits(COUNT, heartbeat=True)
    before = len(os.listdir("/proc/self/fd"))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    own = [heartbeat.Heartbeat(rank, COUNT, 60, ("127.0.0.1", store.port)) for rank in range(COUNT)]
    connections = (len(os.listdir("/proc/self/fd")) - before) / 2 / COUNT  # both ends of each are in this process
    beats = own[0]._read()

    def limits(launcher_keeps_the_store):
        resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, hard))
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(launcher_keeps_the_store)
        child = os.fork()
        if not child:
            open_files.raise_limits(COUNT, heartbeat=True)
            os._exit(0)
        return os.waitpid(child, 0)[1], resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    of_launcher = limits(False), limits(True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOFT, 6 * COUNT - 1))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    try:
        open_files.raise_limits(COUNT, heartbeat=True)
        refusal = ""
    except SettingsError as error:
        refusal = str(error)
    results.put((connections, len(beats), of_launcher, refusal))
    results.close()
    results.join_thread()
    os._exit(0)


def test_the_limit_of_open_files_is_raised_for_the_store_or_refused():
    results = server().Queue()
    process = server().Process(target=check_limits, args=(results,))
    process.start()
    connections, beats, of_launcher, refusal = results.get(timeout=60)
    process.join()
    assert 2 <= connections < 2.2  # of a process to the store, besides torch's own
    assert beats == COUNT
    assert of_launcher == ((0, SOFT), (0, 3 * COUNT + open_files._OTHERS))
    assert refusal.startswith(f"the limit of open files: {6 * COUNT - 1} (ulimit -Hn) is not allowed for {COUNT} proc")
    assert f"at least {6 * COUNT + open_files._OTHERS}, for their connections; TORCH_GLOO_LAZY_INIT=1" in refusal


@pytest.mark.parametrize(("shared", "expected"), [("True", "2"), ("False", "0"), (None, "0")])
def test_attempts_are_counted_where_they_share_a_store(monkeypatch, shared, expected):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    if shared is None:
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    else:
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
    assert rendezvous.attempt() == expected


@pytest.mark.exhaustive  # one more, over two nodes, is in test_slurm.py
@pytest.mark.parametrize(
    ("engine", "rank", "number", "backend"),
    [
        ("cpu_zero2", 1, signal.SIGKILL, "static"),
        ("cpu_ddp", 0, signal.SIGKILL, "static"),
        ("cpu_ddp", 1, signal.SIGKILL, "c10d"),
        ("cpu_fsdp2", 0, signal.SIGKILL, "static"),
        ("cpu_zero3", 1, signal.SIGSTOP, "static"),  # torch waits 30 s for it to end
    ],
)
def test_the_launcher_starts_a_run_again_that_has_lost_a_process(config, tmp_path, engine, rank, number, backend):
    arguments = ("--config", config, "--train.heartbeat_timeout_seconds", 4, "--run_dir")
    whole, run = tmp_path / "whole", tmp_path / "run"
    output, status = Forked(*arguments, whole, processes=2, engine=engine).wait()
    assert status == 0, output
    line = command(
        *arguments, run, processes=2, engine=engine, launch_options=("--max_restarts", 1, "--rdzv_backend", backend)
    )
    own = environment() | ({"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if backend == "c10d" else {})
    with subprocess.Popen(line, env=own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        while launcher.poll() is None and not any(row["step"] >= 12 for row in rows(run)):
            time.sleep(0.005)
        for worker in psutil.Process(launcher.pid).children(recursive=True):
            if worker.environ().get("RANK") == str(rank):
                worker.send_signal(number)
        output, _ = launcher.communicate(timeout=200)
    assert launcher.returncode == 0, output
    assert "Traceback" not in output
    (said,) = named(output)
    assert said.startswith(f"rank {rank} on {HOST}")
    assert output.count("resumed from") == 1
    assert differences(run / "checkpoints" / "step_00000024", whole / "checkpoints" / "step_00000024") == []
