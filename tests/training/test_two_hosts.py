"""Two hosts, as network namespaces joined by a cable: one dies, the cable is cut, the run ends as if undisturbed."""

import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from stacey_dist.checkpoint import find_checkpoints
from stacey_dist.checkpoint.compare import differences
from stacey_dist.checkpoint.manifest import step_of
from tests.training.forked import ROOT, Forked, command, environment
from tests.training.helpers import training_rows, write_config

pytestmark = pytest.mark.exhaustive
STEPS = 60
ENGINE = "cpu_zero2"


@pytest.fixture
def hosts():
    """The names of two namespaces and their ends of the cable."""
    if os.geteuid() != 0:
        pytest.skip("making network namespaces needs root")
    tag = f"{os.getpid() % 100000}"
    names = [f"stacey{tag}a", f"stacey{tag}b"]

    def ip(*arguments):
        subprocess.run(["ip", *arguments], check=True)

    made = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ends = [f"v{tag}{letter}" for letter in "ab"]
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for number, (name, end) in enumerate(zip(names, ends, strict=True), start=1):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", end)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", end, "up")
        yield list(zip(names, ends, strict=True))
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False)


class Hosts:
    """A run of one process on each host."""

    def __init__(self, hosts, directory, *arguments):
        self.launchers = []
        for rank, (name, end) in enumerate(hosts):
            options = (
                "--num_processes", 2, "--num_machines", 2, "--machine_rank", rank,
                "--main_process_ip", "10.77.0.1", "--main_process_port", 29511,
            )  # fmt: skip
            line = command(*arguments, engine=ENGINE, launch_options=options)
            log = (Path(directory) / f"host{rank}.txt").open("a")
            self.launchers.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, *line],
                    env=environment() | {"GLOO_SOCKET_IFNAME": end},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                )
            )
            log.close()

    def wait_for_step(self, run, step):
        deadline = time.monotonic() + 120
        while not any(row["step"] >= step for row in training_rows(run)):
            assert all(launcher.poll() is None for launcher in self.launchers), "ended early"
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def kill(self, rank):
        launcher = psutil.Process(self.launchers[rank].pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.send_signal(signal.SIGKILL)

    def wait(self):
        return [launcher.wait(timeout=120) for launcher in self.launchers]


def test_a_host_dies_and_the_cable_is_cut(hosts, tmp_path):
    config = write_config(tmp_path, train={"max_steps": STEPS, "eval_every_steps": STEPS, "micro_batch_size": 2})
    run, arguments = tmp_path / "run", ("--config", config, "--checkpoint.every_steps", 3, "--run_dir")
    # Two processes on one host make the same sums, so what they do is what two undisturbed hosts would do.
    output, status = Forked(*arguments, tmp_path / "whole", processes=2, engine=ENGINE).wait()
    assert status == 0, output

    first = Hosts(hosts, tmp_path, *arguments, run)
    first.wait_for_step(run, 10)
    first.kill(1)
    assert first.wait()[0] != 0, "the other host stops by itself"

    second = Hosts(hosts, tmp_path, *arguments, run)
    second.wait_for_step(run, 25)
    (_, _), (name, end) = hosts
    subprocess.run(["ip", "-n", name, "link", "set", end, "down"], check=True)
    time.sleep(2)
    assert max(row["step"] for row in training_rows(run)) < STEPS, "the cable was cut too late"
    for rank in (0, 1):
        second.kill(rank)
    second.wait()
    subprocess.run(["ip", "-n", name, "link", "set", end, "up"], check=True)
    at_the_cut = step_of(find_checkpoints(run / "checkpoints")[0])
    assert at_the_cut >= 21

    # Half of the rest on one host, the other half on both again.
    middle = (at_the_cut + STEPS) // 2
    stop = ("--train.max_steps", STEPS, "--checkpoint.every_steps", 1)
    group = Forked(*arguments, run, *stop, processes=2, engine=ENGINE)
    while group.alive() and not any(row["step"] >= middle for row in training_rows(run)):
        time.sleep(0.002)
    group.send(signal.SIGTERM)
    output, status = group.wait()
    assert status == 128 + signal.SIGTERM, output
    assert f"after {at_the_cut} updates" in output

    third = Hosts(hosts, tmp_path, *arguments, run)
    assert third.wait() == [0, 0], (tmp_path / "host0.txt").read_text()[-3000:]
    last = f"checkpoints/step_{STEPS:08d}"
    assert differences(run / last, tmp_path / "whole" / last) == []
