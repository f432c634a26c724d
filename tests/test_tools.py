"""`stacey-dist bench` and `stacey-dist info`."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tests.training.forked  # noqa: F401  # bench forks from its server
from stacey_dist import info
from stacey_dist.bench import command as bench
from stacey_dist.bench import pairs
from stacey_dist.bench.rivals import PEER, SETTINGS, Compiled, Rival, Stacey
from stacey_dist.cli import exit_status, main
from stacey_dist.optim import kernels
from stacey_dist.optim.kernels import NoKernelError


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--processes", "-1"), "--processes must be at least 1, got -1"),
        (("--device", "cuda"), "torch sees no GPU here"),
        (("--json", "nowhere/figures.json"), "--json nowhere/figures.json: nowhere is no directory"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(arguments, complaint, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", *arguments]) == 2
    assert complaint in capsys.readouterr().err


PRINTS = """\
import sys
from stacey_dist.cli import exit_status
def work():
    for _ in range(10_000):
        print("a line that is written")
    return 0
sys.exit(exit_status(work, "stacey-dist"))
"""


def test_a_reader_that_has_read_enough_is_no_error():
    """As `| head` closes the pipe: nothing is said, and the status is that of a program that the signal ends."""
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", PRINTS], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_a_pipe_that_is_not_that_of_the_reader_is_an_error(capfd):
    def work():
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    assert exit_status(work, "stacey-dist") == 1
    assert capfd.readouterr().err == "stacey-dist: [Errno 32] Broken pipe\n"


def test_bench_compares_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.CASES, "flat", lambda: [(3000,)])
    monkeypatch.setitem(bench.CASES, "tiny", lambda: [(7,)] * 5)
    file = tmp_path / "figures.json"
    assert main(["bench", "--case", "tiny", "--case", "flat", "--rounds", "3", "--json", str(file)]) == 0
    tiny, flat = json.loads(file.read_text())
    assert (tiny["elements"], tiny["tensors"], flat["elements"], flat["tensors"]) == (35, 5, 3000, 1)
    rows = {row["optimizer"]: row for row in flat["rows"]}
    assert rows[PEER]["ratio"] == 1.0
    assert {"Stacey p2, p = 2.8, kernel", "torch SGD, momentum, foreach", "lion-pytorch"} <= rows.keys()
    for row in rows.values():
        assert 0 < row["ns_minimum"] <= row["ns_median"]
        assert 0 < row["ratio_lowest"] <= row["ratio"] <= row["ratio_highest"]
        assert row["ratio_of_best"] > 0
        assert row["gigabytes_per_second"] == pytest.approx(row["bytes"] / row["ns_median"])
    printed = capsys.readouterr().out
    assert printed.count(f"| {PEER} |") == 2
    assert "3,000 elements in 1 tensors" in printed


def test_a_pair_takes_turns_and_another_one_goes_first_each_time(monkeypatch):
    turns = []

    def spy(name):
        return Rival(20, lambda params: lambda: turns.append(name))

    monkeypatch.setattr(pairs, "rivals", lambda slow: {PEER: spy("peer"), "ours": spy("ours")})
    pair = pairs.measure_pair("ours", [(3,)], "cpu", 4, rival_is_first=True)
    assert turns[-8:] == ["ours", "peer", "peer", "ours"] * 2
    assert len(pair.rival) == len(pair.peer) == 4
    pairs.measure_pair("ours", [(3,)], "cpu", 1, rival_is_first=False)
    assert turns[-2:] == ["peer", "ours"]


@pytest.mark.slow
def test_the_benchmark_for_gpus_runs_as_a_whole(tmp_path, monkeypatch, capfd):
    """On toys: what it measures has no meaning, and is there."""
    file = tmp_path / "gpu.json"
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--smoke", "--json", str(file)])
    monkeypatch.setattr(bench, "CASES", {})
    monkeypatch.setattr(pairs, "PRELOADED", [])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("gpu").main()
    printed = capfd.readouterr()
    assert ended.value.code == 0, printed.err[-3000:]
    figures = json.loads(file.read_text())
    assert [row["optimizer"] for row in figures["optimizers"][0]["rows"]][1:] == [
        "torch AdamW, foreach",
        "Stacey p2, p = 2.8, kernel",
    ]
    assert figures["failed"] == {}
    parts = ("llama launcher", "llama bare", "resnet50 with loader", "resnet50 without loader")
    runs = [run for part in parts for run in figures[part]]
    assert len(runs) == 4
    assert all(run["seconds"] > 0 and run["peak_bytes"] > 2**20 for run in runs)
    assert all(run["save_stall_seconds"] > 0 for run in runs if "units_per_second" in run)
    assert runs[0]["units_per_second"] == pytest.approx(16 * 32 / runs[0]["seconds"])
    for line in ("toys, no figure means anything", "| launcher over a bare loop", "| … over what was planned"):
        assert line in printed.out


def test_a_part_of_the_benchmark_for_gpus_that_fails_costs_its_own_figures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    gpu = importlib.import_module("gpu")
    made = iter([{"units_per_second": 3.0}, MemoryError("full\nand more")])

    def in_a_process(function, *arguments):
        if isinstance(result := next(made), Exception):
            raise result
        return result

    monkeypatch.setattr(gpu.pairs, "in_a_process", in_a_process)
    figures = gpu.measure("cpu", False, tmp_path / "gpu.json", "resnet50")
    assert json.loads((tmp_path / "gpu.json").read_text()) == figures
    table = gpu.table(figures)
    assert "| ResNet-50 with the loader, images/s | 3 |" in table
    assert "| resnet50 without loader failed | MemoryError: full |" in table


@pytest.mark.exhaustive  # a minute in the compiler, for a figure of `bench --slow`
def test_the_compiled_plain_rule_that_is_measured_is_an_update():
    theta = torch.randn(300)
    param = torch.nn.Parameter(theta.clone())
    param.grad = torch.randn(300)
    optimizer = Stacey([param], p=2.8, fused=False, **SETTINGS)
    compiled = Compiled(optimizer)
    before = param.detach().clone(), optimizer.state[param]["z"].clone()
    compiled.step()
    assert (param != before[0]).float().mean() > 0.9
    assert not torch.equal(optimizer.state[param]["z"], before[1])


def test_the_list_of_parameters_is_the_models():
    config = LlamaConfig(
        vocab_size=32100, hidden_size=640, intermediate_size=1708, num_hidden_layers=12, num_attention_heads=10
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sorted(bench.llama_100m_shapes()) == sorted(tuple(p.shape) for p in model.parameters())


def test_info_names_versions_and_the_kernel_or_what_it_lacks(capsys, monkeypatch):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    assert f"kernel on cpu: {kernels.find('cpu').name}, since torch takes this processor for" in out

    def missing(device_type):
        raise NoKernelError("no compiler was there")

    monkeypatch.setattr(kernels, "find", missing)
    main(["info"])
    assert "kernel on cpu: none, the plain rule runs: no compiler was there" in capsys.readouterr().out


def test_info_says_what_is_missing_and_what_installs_it(capsys, monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("WANDB_API_KEY", "secret-of-mine")
    main(["info"])
    whole = capsys.readouterr().out
    assert "engine DeepSpeed ZeRO-1, 2, 3: yes" in whole
    assert "engine FSDP2, HSDP: yes" in whole
    assert "gloo" in whole
    assert "NCCL_SOCKET_IFNAME=eth7" in whole
    assert "secret-of-mine" not in whole

    def missing(package):
        raise info.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(info.importlib.metadata, "version", missing)
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    main(["info"])
    bare = capsys.readouterr().out
    assert "deepspeed is not installed" in bare
    assert "engine DeepSpeed ZeRO-1, 2, 3: no: pip install 'stacey_dist[deepspeed]'" in bare
    assert "compiler: none; apt-get install g++" in bare
