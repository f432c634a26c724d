"""`python -m experiments reproduce`: files, settings, and what a kill leaves."""

import json
import shutil
import signal
import threading
from dataclasses import replace

import pytest
from PIL import Image

from experiments import framework, registry
from experiments.__main__ import main
from experiments.framework import Outcome, Part, Reproduction, Scale
from experiments.trial import TrialError
from stacey_dist.errors import SettingsError
from tests.training.forked import Forked

TOY = {
    "synthetic": Scale("a toy", 3, {"iterations": 40}),
    "theorem": Scale("a toy", 3, {"largest_power": 6}),
}
FILES = ("results.json", "table.md")


@pytest.fixture(autouse=True)
def toys():
    with pytest.MonkeyPatch.context() as patch:
        for name, toy in TOY.items():
            patch.setitem(registry.EXPERIMENTS[name].scales, "toy", toy)
        yield


def contents(directory):
    return {name: (directory / name).read_bytes() for name in FILES}


@pytest.mark.parametrize("name", TOY)
def test_end_to_end(name, tmp_path, capsys):
    assert main(["reproduce", name, "--scale", "toy", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert (tmp_path / "table.md").read_text() in printed.out
    assert "100%" in printed.err  # the bar
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["settings"]["scale"], results["settings"]["seeds"]) == ("toy", 3)
    assert results["parts"].keys() == {file.stem for file in (tmp_path / "parts").iterdir()}
    with Image.open(tmp_path / f"{name}.png") as figure:
        assert figure.width > 1000
    rows = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("|")]
    assert all(len(row.split("|")) >= 7 for row in rows)
    assert not list(tmp_path.rglob("*.tmp*"))
    expected = {"synthetic": 2 + 12 + 2 + 27, "theorem": 2 + 10}
    assert len(rows) == expected[name]


KILLED = """
import os, signal, sys
from experiments.__main__ import main
from experiments import framework, registry
from tests.experiments.test_reproduce import TOY

name, out, parts = sys.argv[1], sys.argv[2], int(sys.argv[3])
registry.EXPERIMENTS[name].scales["toy"] = TOY[name]
replace = os.replace

def dies(source, target):
    if "parts" in str(target) and len(os.listdir(os.path.dirname(target))) > parts:
        os.kill(os.getpid(), signal.SIGKILL)  # the part is computed, and lies beside its name
    replace(source, target)

os.replace = dies
main(["reproduce", name, "--scale", "toy", "--out", out])
"""


@pytest.mark.exhaustive
def test_killed_in_the_middle_it_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = ["reproduce", "theorem", "--scale", "toy", "--out"]
    program = tmp_path / "program.py"
    program.write_text(KILLED)
    output, status = Forked("theorem", killed, 4, program=program).wait()
    assert status == -signal.SIGKILL, output
    finished = sorted((killed / "parts").glob("*.json"))
    assert len(finished) == 4
    assert not (killed / "table.md").exists()
    times = [file.stat().st_mtime_ns for file in finished]
    computed = []
    compute = framework.dump
    monkeypatch.setattr(framework, "dump", lambda value: computed.append(value) or compute(value))
    assert main([*arguments, str(killed)]) == 0
    assert len(computed) == 6 + 1  # what was left, and results.json
    assert [file.stat().st_mtime_ns for file in finished] == times
    assert main([*arguments, str(whole)]) == 0
    assert contents(killed) == contents(whole)
    assert (killed / "theorem.png").read_bytes() == (whole / "theorem.png").read_bytes()


def test_a_finished_part_is_read_not_computed(tmp_path):
    def never(advance):
        raise AssertionError

    reproduction = Reproduction(TOY["theorem"], 3, tmp_path)
    value = {"third": 1 / 3, "list": [0.1, 1e-300]}
    assert reproduction.compute({1: Part("a", lambda advance: value)}) == [{1: value}]
    assert reproduction.compute({1: Part("a", never)}, {(2, 3): Part("a", never)}) == [{1: value}, {(2, 3): value}]
    with pytest.raises(ValueError, match="not JSON compliant"):  # rather than a file that other programs cannot read
        reproduction.compute({1: Part("b", lambda advance: float("nan"))})
    assert not (tmp_path / "parts" / "b.json").exists()


def test_the_first_error_is_told_at_once():
    """Not after jobs that were begun before it, which are told to stop."""
    stop, late = threading.Event(), []

    def long():
        late.append(stop.wait(timeout=60))

    def bad():
        raise SettingsError("at once")

    with pytest.raises(SettingsError, match="at once"):
        framework.together([long, bad], 2, stop)
    assert late == [True]


def test_other_sizes_or_configurations_are_not_mixed(tmp_path, monkeypatch, capsys):
    """Parts that were finished with what the files said before would stand beside those of now."""
    configs = tmp_path / "configs"
    shutil.copytree(framework.configs() / "sweeps" / "llm", configs / "sweeps" / "llm")
    monkeypatch.setattr(framework, "configs", lambda: configs)
    ablation = registry.EXPERIMENTS["ablation"]
    monkeypatch.setattr(registry, "EXPERIMENTS", {"ablation": replace(ablation, run=lambda r: Outcome({}, "", {}))})
    command = ["reproduce", "ablation", "--out", str(tmp_path / "out")]
    assert main(command) == main(command) == 0
    file = configs / "sweeps" / "llm" / "base.yaml"
    before = file.read_text()
    file.write_text(before + "# changed\n")
    assert main(command) == 2
    assert "holds a run with scale's sizes and configuration files of sha256" in capsys.readouterr().err
    file.write_text(before)
    assert main(command) == 0
    monkeypatch.setitem(ablation.scales, "cpu", replace(ablation.scales["cpu"], settings={"changes": ()}))
    assert main(command) == 2


def test_settings_are_told_apart_by_their_text():
    """The digest is of it, so it must hold no addresses."""
    for experiment in registry.EXPERIMENTS.values():
        assert not any(" at 0x" in repr(scale.settings) for scale in experiment.scales.values())
        assert all(list(framework.configs().glob(pattern)) for pattern in experiment.files)


def test_training_that_fails(tmp_path, monkeypatch, capsys):
    def fails(*given, **settings):
        raise TrialError("output.txt: exit status 1\nKilled")

    monkeypatch.setattr(framework, "reproduce", fails)
    assert main(["reproduce", "ablation", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "experiments: output.txt: exit status 1\nKilled\n"


def test_list(capsys):
    assert main(["reproduce", "list"]) == 0
    printed = capsys.readouterr().out
    for name in ("synthetic", "theorem", "cifar", "imagenet", "llm", "ablation"):
        assert f"\n{name}: " in f"\n{printed}"
    assert "--scale paper" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["figure1"], "reproduce: figure1 is not known; there are list, synthetic, theorem, "),
        (["theorm"], "reproduce: theorm is not known; did you mean theorem? "),
        (["theorem", "--workers", "0"], "--workers 0: it must be at least 1"),
        (["theorem", "--data", "DIR"], "--data DIR: theorem takes no data"),
        (["llm", "--scale", "laptop"], "--scale laptop: it must be one of cpu, gpu, paper for llm"),
        (["theorem", "--scale", "paper"], "--scale paper: it must be one of cpu, toy for theorem"),
        (["theorem", "--scale", "toy", "--seeds", "1"], "--seeds 1: it must be at least 2"),
        (
            ["theorem", "--scale", "toy", "--seeds", "4"],
            "it must be another directory, for this one holds a run with seeds 3",
        ),
    ],
)
def test_bad_settings(arguments, message, tmp_path, capsys):
    with framework.claimed(
        tmp_path,
        {"experiment": "theorem", "scale": "toy", "seeds": 3},
    ):
        pass
    assert main(["reproduce", *arguments, "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_results_of_unknown_data_are_not_continued(tmp_path, capsys):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts/0.json").write_text("{}")
    assert main(["reproduce", "theorem", "--scale", "toy", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"--out {tmp_path}: it must be another directory, for this one holds results and no settings.json" in error


def test_data_of_another_size_are_other_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "folder").mkdir()
    before = framework.identity_of_data("a.txt,folder")
    assert before == f"{tmp_path}/a.txt of 3 bytes,{tmp_path}/folder"
    (tmp_path / "a.txt").write_text("more")
    assert framework.identity_of_data(f"{tmp_path}/a.txt,folder") != before
    assert framework.identity_of_data(None) is None
