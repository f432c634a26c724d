"""W&B's sweep files, as they are read here; those of the repository hold what the launchers take."""

import math
import re

import pytest
import yaml

from experiments.comparison import PAPER_OPTIMIZERS
from experiments.sweep import Range, read_sweep
from experiments.trial import Trial
from stacey_dist.errors import SettingsError
from stacey_dist.training.launchers import LAUNCHERS
from tests.experiments.tasks import ROOT

SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*/[!b]*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_corners_of_every_range_are_valid_settings(file, tmp_path):
    sweep = read_sweep(file)
    assert sweep.config == file.with_name("base.yaml")
    assert (sweep.metric, sweep.maximize) == {
        "train_llm.py": ("eval_loss", False),
        "train_imagenet.py": ("eval_top1", True),
    }[sweep.program]
    for corner in (0, -1):
        values = {n: [s.low, s.high][corner] if isinstance(s, Range) else s[corner] for n, s in sweep.space.items()}
        trial = Trial(sweep.program, sweep.config, {**sweep.fixed, **values}, tmp_path)
        parsed = LAUNCHERS[sweep.program].parse(trial.arguments())
        for name, value in {**sweep.fixed, **values}.items():
            section, setting = name.split(".")
            there = getattr(getattr(parsed, section), setting)
            assert list(there) == value if isinstance(value, list) else there == value, name
    variant = {
        "stacey_p2": "p2",
        "stacey_pp": "pp",
        "stacey_2p": "2p",
        "stacey_p2_tau": "p2",
        "stacey_p2_scheduled": "p2",
        "stacey_uncoupled": "p2",
    }.get(file.stem)
    assert sweep.fixed["optimizer.name"] == ("stacey" if variant else file.stem)
    assert sweep.fixed.get("optimizer.variant") == variant
    assert "lr" in {name.split(".")[1] for name in sweep.space}


def test_every_optimizer_of_the_paper_has_a_sweep_for_every_task():
    for task in ("llm", "cifar"):
        assert {file.stem for file in SWEEPS if file.parent.name == task} >= set(PAPER_OPTIMIZERS)


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_the_command_is_one_that_an_agent_can_start(file):
    """W&B replaces ${program} and ${args}; what the agent adds comes last, so that it wins over the file."""
    content = yaml.safe_load(file.read_text())
    assert content["method"] in ("bayes", "random", "grid")
    *start, arguments = content["command"]
    assert start[:3] == ["accelerate", "launch", "${program}"]
    assert arguments == "${args}"
    assert "--tracking.trackers" in start  # without it, W&B would not hear of the metric
    assert f"configs/sweeps/{file.parent.name}/{file.name}" in file.read_text()


GOOD = {
    "program": "train_llm.py",
    "command": ["accelerate", "launch", "${program}", "--config", "base.yaml", "${args}"],
    "metric": {"name": "eval_loss"},
    "parameters": {"optimizer.lr": {"min": 0.1, "max": 1.0}},
}


def write(directory, **changes):
    (directory / "base.yaml").write_text("seed: 0\n")
    file = directory / "sweep.yaml"
    file.write_text(yaml.safe_dump(GOOD | changes))
    return file


def test_what_is_read(tmp_path):
    parameters = {
        "optimizer.name": {"value": "stacey"},
        "optimizer.p": {"values": [3, 4.5, math.inf]},
        "optimizer.lr": {"min": 0.001, "max": 1, "distribution": "log_uniform_values"},
        "optimizer.tau": {"min": 0, "max": 0.5},
        "train.max_steps": {"min": 3, "max": 9},
        "seed": {"distribution": "constant", "value": 3},
    }
    command = ["accelerate", "launch", "${program}", "--config", "base.yaml", "--data.path", "a/b"]
    command += ["--tracking.trackers", "wandb", "--train.epochs=2", "${args}"]
    file = write(
        tmp_path,
        program="train_imagenet.py",
        command=command,
        parameters=parameters,
        metric={"name": "eval_top1", "goal": "maximize"},
    )
    sweep = read_sweep(file)
    assert (sweep.config, sweep.metric, sweep.maximize) == (tmp_path / "base.yaml", "eval_top1", True)
    assert sweep.fixed == {"optimizer.name": "stacey", "data.path": "a/b", "train.epochs": 2, "seed": 3}
    assert sweep.space == {
        "optimizer.p": [3, 4.5, ".inf"],  # as JSON can hold it, and the launchers read it
        "optimizer.lr": Range(0.001, 1, log=True, whole=False),
        "optimizer.tau": Range(0, 0.5, log=False, whole=False),
        "train.max_steps": Range(3, 9, log=False, whole=True),
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"program": "train.py"}, "program: train.py is not allowed; it must be train_llm.py or train_imagenet.py"),
        ({"command": ["python", "${program}", "${args}"]}, "a command with --config FILE"),
        ({"command": ["python", "--config", "missing.yaml"]}, "--config missing.yaml is neither in a directory above"),
        (
            {"metric": {"name": "loss"}},
            "metric.name: loss is not allowed; it must be eval_loss or eval_perplexity for tra",
        ),
        (
            {"parameters": None},
            "it must hold program, a command with --config FILE, metric with a name, and parameters",
        ),
        ({"method": "grid"}, "method: grid is not allowed; it must be bayes"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate: {'type': 'hyperband'} is not known here"),
        ({"command": ["${program}", "--config", "base.yaml", "again"]}, "command: again is not known here"),
        ({"command": ["train_llm.py", "--config", "base.yaml", "again"]}, "command: again is not known here"),
        ({"command": ["--config", "base.yaml", "again"]}, "command: again is not known here"),
        ({"metric": {"name": "eval_loss", "goal": "less"}}, "metric.goal: less is not allowed"),
        ({"parameters": {"optimizer.lr": {"min": 1.0, "max": 0.1}}}, "they must be finite numbers, min below max"),
        ({"parameters": {"optimizer.lr": {"min": "low", "max": 0.1}}}, "optimizer.lr: min 'low', max 0.1 are not"),
        ({"parameters": {"optimizer.lr": {"min": 0.1}}}, "it must have value, values, or min and max"),
        ({"parameters": {"optimizer.lr": {"value": 0.1, "min": 0.1, "max": 1}}}, "it must have value, values"),
        (
            {"parameters": {"optimizer.lr": {"values": [0.1], "min": 0.1, "max": 1}}},
            "it must have value, values, or min",
        ),
        (
            {"parameters": {"optimizer.lr": {"value": 0.1, "distribution": "log_normal"}}},
            "distribution: log_normal does not go with value; it may be constant",
        ),
        ({"metric": {"name": "eval_loss", "target": 2.0}}, "metric.target: 2.0 is not known here"),
        ({"parameters": {"optimizer.lr": 3}}, "optimizer.lr: 3 is not allowed"),
        (
            {"parameters": {"a.b": {"min": 1, "max": 2, "distribution": "normal"}}},
            "distribution: normal does not go with min and max; it may be uniform, int_uniform",
        ),
        (
            {"command": ["${program}", "--config", "base.yaml", "--config=more.yaml"]},
            "command: it has several --config",
        ),
        (
            {"command": ["${program}", "--config", "base.yaml", "--seed", "[1"]},
            "command: --seed [1: line 1, column 3: is not valid",
        ),
        (
            {"parameters": {"a.b": {"min": 0.5, "max": 2, "distribution": "int_uniform"}}},
            "distribution: int_uniform does not go with min 0.5 and max 2",
        ),
        (
            {"parameters": {"a.b": {"min": 0, "max": 2, "distribution": "categorical"}}},
            "distribution: categorical does not go with min and max; it may be uniform",
        ),
        ({"parameters": {"a.b": {"values": 0.1}}}, "values: 0.1 is not allowed; it must be a list"),
        ({"parameters": {"a.b": {"values": "abc"}}}, "values: 'abc' is not allowed; it must be a list"),
        ({"parameters": {"a.b": {"values": []}}}, "values: [] is not allowed; it must be a list"),
        ({"parameters": {"a.b": {"min": 0, "max": math.inf}}}, "min 0, max inf are not allowed"),
        (
            {"parameters": {"a.b": {"min": 0, "max": 2, "distribution": "log_uniform_values"}}},
            "min 0 is not allowed; it must be above 0",
        ),
    ],
)
def test_what_is_refused(tmp_path, changes, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        read_sweep(write(tmp_path, **changes))


def test_no_file_or_no_yaml(tmp_path):
    with pytest.raises(SettingsError, match=r"none\.yaml: cannot be read"):
        read_sweep(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(SettingsError, match=r"bad\.yaml: line 1, column 5: is not valid YAML"):
        read_sweep(tmp_path / "bad.yaml")
    (tmp_path / "text.yaml").write_text("text")
    with pytest.raises(SettingsError, match="it must hold program"):
        read_sweep(tmp_path / "text.yaml")


def test_the_configuration_is_the_files_own_wherever_the_program_is_started(tmp_path, monkeypatch):
    here, other = tmp_path / "here", tmp_path / "other"
    for directory in (here, other):
        directory.mkdir()
        write(directory)
    monkeypatch.chdir(other)
    assert read_sweep(here / "sweep.yaml").config == here / "base.yaml"
