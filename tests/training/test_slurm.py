"""The batch scripts under configs/slurm, for real, but for Slurm: its commands are stand-ins on this machine."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from stacey_dist.checkpoint.compare import differences
from tests.training.forked import ROOT, Forked, _port, environment
from tests.training.helpers import rows, write_config

SCRIPTS = sorted((ROOT / "configs" / "slurm").glob("*.sbatch"))

SRUN = """\
import os, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    del command[0]
nodes = [
    subprocess.Popen(command, env=os.environ | {"SLURM_PROCID": str(rank)})
    for rank in range(int(os.environ["SLURM_NNODES"]))
]
with open(os.environ["CALLS"] + ".step", "w") as file:
    print(*(node.pid for node in nodes), file=file)
signal.signal(signal.SIGTERM, lambda *_: [node.kill() for node in nodes])  # "forcing job termination"
sys.exit(max(abs(node.wait()) for node in nodes))
"""
SCONTROL = """\
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\n127.0.0.1")
else:
    with open(os.environ["CALLS"], "a") as calls:
        print(*sys.argv[1:], file=calls)
"""
SCANCEL = """\
import os, signal, sys
import psutil
with open(os.environ["CALLS"], "a") as calls:
    print("scancel", *sys.argv[1:], file=calls)  # to all processes of the job's steps
with open(os.environ["CALLS"] + ".step") as file:
    launchers = [psutil.Process(int(pid)) for pid in file.read().split()]
for process in [each for launcher in launchers for each in [launcher, *launcher.children(recursive=True)]]:
    process.send_signal(signal.SIGTERM)
"""
ACCELERATE = """\
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
"""


class Slurm:
    """Two nodes, a job number, and a log of what was asked of scontrol."""

    def __init__(self, directory, **commands):
        self.bin, self.calls = directory / "bin", directory / "calls"
        self.bin.mkdir()
        self.calls.touch()
        for name, program in {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, **commands}.items():
            path = self.bin / name
            path.write_text(f"#!{sys.executable}\n{program}")
            path.chmod(0o755)
        self.directory = directory

    def start(self, script, *arguments, **variables):
        """The job, as sbatch starts it: a copy of the script, in the source tree."""
        copied = shutil.copy(script, self.directory / "slurm_script")
        path = f"{self.bin}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        given = {
            "PATH": path, "PYTHONPATH": str(ROOT), "CALLS": str(self.calls), "SLURM_JOB_ID": "1234",
            "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_JOB_NAME": Path(script).stem,
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", copied, *map(str, arguments)],
            env=environment() | given | variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_each_node_gets_one_launcher_and_an_array_its_seeds(tmp_path, script):
    slurm = Slurm(tmp_path, accelerate=ACCELERATE)
    array = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}
    job = slurm.start(script, "--train.max_steps", 7, ENGINE="zero2", RUN_DIR="/shared/a run", **array)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    calls = sorted(yaml.safe_load(line) for line in slurm.calls.read_text().splitlines())
    port = str(20000 + 1234)
    for rank, call in enumerate(calls):
        assert call == [
            "launch", "--config_file", "configs/accelerate/zero2.yaml", "--num_machines", "2", "--num_processes", "16",
            "--machine_rank", str(rank), "--main_process_ip", "127.0.0.1", "--main_process_port", port,
            "--max_restarts", "1", f"{script.stem}.py", "--config", call[call.index("--config") + 1],
            "--run_dir", "/shared/a run/seed_3", "--seed", "3", "--train.max_steps", "7",
        ]  # fmt: skip
    assert len(calls) == 2


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_what_a_script_names_is_there(script):
    text = script.read_text()
    assert {"--requeue", "--signal=B:USR1@180", "--ntasks-per-node=1"} <= set(re.findall(r"#SBATCH (\S+)", text))
    named = re.findall(r"configs/[\w./]+\.(?:sh|yaml)", text)
    assert len(named) == 3
    assert [name for name in named if not (ROOT / name).exists()] == []


LONG_STEP = """\
import os, time
with open(os.environ["CALLS"] + ".step", "w") as file:
    file.write(str(os.getpid()))
time.sleep(60)
"""


def test_the_end_of_the_time_of_one_element_of_an_array_ends_no_other(tmp_path):
    """One element has the array's number for its own, and a signal to that number is one to all elements."""
    slurm = Slurm(tmp_path, srun=LONG_STEP)
    array = {"SLURM_JOB_ID": "36", "SLURM_ARRAY_JOB_ID": "36", "SLURM_ARRAY_TASK_ID": "0"}
    job = slurm.start(SCRIPTS[0], RUN_DIR=str(tmp_path / "run"), **array)
    deadline = time.monotonic() + 60
    while not (tmp_path / "calls.step").exists() or not (tmp_path / "calls.step").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 128 + signal.SIGTERM, output
    assert slurm.calls.read_text() == "scancel --signal=TERM 36_0\nrequeue 36_0\n"


def wait_for_step(job, run, step):
    deadline = time.monotonic() + 200
    while job.poll() is None and not any(row["step"] >= step for row in rows(run)):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    assert job.poll() is None, job.stdout.read()[-5000:]


@pytest.mark.exhaustive
def test_a_lost_process_and_a_preemption_change_nothing(tmp_path):
    """Two nodes of one process: one is killed, then the time is over, then the job is started again."""
    config = write_config(tmp_path, train={"max_steps": 60, "eval_every_steps": 60}, checkpoint={"every_steps": 5})
    whole, run = tmp_path / "whole", tmp_path / "run"
    output, status = Forked("--config", config, "--run_dir", whole, processes=2, engine="cpu_zero2").wait()
    assert status == 0, output

    slurm = Slurm(tmp_path)
    settings = {"ENGINE": "cpu_zero2", "PROCESSES_PER_NODE": "1", "RUN_DIR": str(run), "MASTER_PORT": str(_port())}
    settings["CONFIG"] = str(config)
    job = slurm.start(SCRIPTS[-1], **settings)
    wait_for_step(job, run, 12)
    (second,) = [p for p in psutil.Process(job.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGKILL)
    wait_for_step(job, run, 25)
    job.send_signal(signal.SIGUSR1)  # --signal=B: tells the script alone
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0
    assert output.count("stopped answering") == 1, output
    assert output.count("resumed from") == 1
    assert output.count("stopped by signal 15 after update") == 1
    assert slurm.calls.read_text() == "scancel --signal=TERM 1234\nrequeue 1234\n"

    job = slurm.start(SCRIPTS[-1], **settings, SLURM_RESTART_COUNT="1")
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 0, output
    assert output.count("resumed from") == 1
    assert slurm.calls.read_text() == "scancel --signal=TERM 1234\nrequeue 1234\n"
    last = "checkpoints/step_00000060"
    assert differences(run / last, whole / last) == []
