"""Comparisons: the report's numbers by hand, and each experiment that trains, end to end at a toy scale."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from PIL import Image

from experiments import ablation, comparison, llm, long, registry
from experiments.__main__ import main
from experiments.comparison_figures import curves, curves_by_p
from experiments.comparison_report import LOOKS, mean_with_interval, report, updates_to_reach
from experiments.framework import Part, Reproduction, Scale
from experiments.trial import Result, Trial
from stacey_dist.training.launchers import LAUNCHERS
from stacey_dist.training.settings.image_config import ImageOptimizerConfig
from tests.ended import still_running
from tests.experiments.tasks import GIVEN, IMAGES, IMAGES_GIVEN, ROOT, TUNED, write_sweeps
from tests.training.helpers import launch, rows


def result(*losses, diverged=False, seconds=1.0, state=8.0, threads=1):
    evaluations = [{"step": 10 * i, "eval_loss": loss} for i, loss in enumerate(losses, start=1)]
    return Result(evaluations, diverged, seconds, state, threads)


def test_updates_to_reach():
    losses = result(4.0, 3.0, 2.0, 1.0).evaluations
    assert updates_to_reach(losses, "eval_loss", 2.5) == 25.0
    assert updates_to_reach(losses, "eval_loss", 2.0) == 30.0
    assert updates_to_reach(losses, "eval_loss", 5.0) == 10.0  # at the first evaluation, or before
    assert updates_to_reach(losses, "eval_loss", 0.5) is None
    accuracies = [{"step": 10, "eval_top1": 0.2}, {"step": 20, "eval_top1": 0.6}]
    assert updates_to_reach(accuracies, "eval_top1", 0.5) == pytest.approx(17.5)
    assert updates_to_reach([{"step": 10, "eval_loss": None}], "eval_loss", 1.0) is None


def test_interval():
    # t with 2 degrees of freedom: 4.303
    mean, half = mean_with_interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert half == pytest.approx(4.302653 * statistics.stdev([1.0, 2.0, 4.0]) / math.sqrt(3))
    assert (mean_with_interval([1.0]), mean_with_interval([])) == ((1.0, None), (None, None))


FOUND = {
    ("adamw", 1): result(3.0, 2.0, 1.0),
    ("adamw", 2): result(3.0, 2.0, 1.2),
    ("lion", 1): result(2.0, 1.0, 0.9, seconds=0.5, state=4.0),
    ("lion", 2): result(2.0, 1.0, 1.0, seconds=0.7, state=4.0),
    ("sgd", 1): result(3.0, 3.0, 3.0, state=4.0),
    ("sgd", 2): result(3.0, None, diverged=True, state=4.0),
}


def test_report():
    settings = {"adamw": {"optimizer.name": "adamw", "optimizer.lr": 0.00123456}, "lion": {}, "sgd": {}}
    searched = {"lion": [{"state": state, "value": 1.0, "settings": {}} for state in ("complete", "pruned", "pruned")]}
    values, table = report(FOUND, "eval_loss", settings, searched, {("lion", 3.0): result(1.5)})
    lion, sgd = values["optimizers"]["lion"], values["optimizers"]["sgd"]
    assert lion["mean"] == pytest.approx(0.95)
    # With seed 1 it is at 1.0 after 20 updates of 30, with seed 2 at 1.2 after 18.
    assert lion["share_of_updates"] == pytest.approx((20 / 30 + 18 / 30) / 2)
    assert lion["time_per_update"] == pytest.approx(0.6)
    assert (sgd["mean"], sgd["diverged"], sgd["share_of_updates"]) == (3.0, 1, None)
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[1:4]] == ["Lion", "AdamW", "SGD, Nesterov"]
    # -0.1 and -0.2 against AdamW; t with one degree of freedom: 12.706
    assert "| 0.9500 ± 0.6353 | -0.1500 ± 0.6353 | 63% | 0.60 x | 4.0 B |" in lines[1]
    assert "| – | 100% |" in lines[2]
    assert "lr 0.00123 |" in lines[2]
    assert "(1 of 2 diverged)" in lines[3]
    assert "Lion 1 / 2 / 0" in table
    assert "| Lion | 1.5000 |" in table
    json.dumps(values, allow_nan=False)


def test_what_was_timed_with_other_threads_is_not_compared():
    found = {**FOUND, ("lion", 2): result(2.0, 1.0, 1.0, threads=2)}
    values, table = report(found, "eval_loss", {name: {} for name, _ in FOUND})
    assert all(row["time_per_update"] is None for row in values["optimizers"].values())
    assert "| 63% | – | " in table


def test_what_diverged_with_some_seed_is_not_first():
    lucky = {("sgd", 1): result(0.1), ("sgd", 2): result(None, diverged=True)}
    values, table = report({**lucky, **FOUND, **lucky}, "eval_loss", {name: {} for name, _ in FOUND})
    assert values["optimizers"]["sgd"]["mean"] == 0.1
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert lines[-1].split("|")[1].strip() == LOOKS["sgd"].label


def test_curves_by_p_are_not_flattened_by_one_that_explodes():
    by_p = {("lion", 2.0): result(5.0, 4.0, 3.0, 2.0), ("lion", 3.0): result(5.0, 14.0, 13.5, 13.0)}
    (axes,) = curves_by_p(by_p, "eval_loss").axes
    assert axes.get_ylim() == pytest.approx((2.0 - 0.09, 5.0 + 0.09))


def test_an_optimizer_without_a_completed_run_is_told_of():
    searched = {"adam": [{"state": "diverged", "value": None, "settings": {}}], "lion": []}
    values, table = report(FOUND, "eval_loss", {name: {} for name, _ in FOUND}, searched)
    assert "Adam 0 / 0 / 1" in table
    assert "Without a completed run, and so left out: Adam." in table
    assert values["untrained"].keys() == {"adam"}


def test_curves_leave_out_what_diverged():
    (axes,) = curves(FOUND, "eval_loss").axes
    drawn = {line.get_label(): list(line.get_ydata()) for line in axes.lines}
    assert drawn["Lion"] == [2.0, 1.0, 0.95]
    assert drawn["SGD, Nesterov"] == [3.0, 3.0, 3.0]


@pytest.fixture(scope="module")
def configs(tmp_path_factory):
    return write_sweeps(tmp_path_factory.mktemp("comparison"))


def test_an_optimizer_without_a_completed_run_does_not_hold_up_the_others(configs, tmp_path, monkeypatch):
    rows = {
        "adamw": [{"state": "diverged", "value": None, "settings": {"optimizer.lr": 9.0}}],
        "stacey_p2": [{"state": "complete", "value": 1.0, "settings": {"optimizer.lr": 0.1}}],
    }
    monkeypatch.setattr(
        comparison, "tuning", lambda reproduction, name, *_: Part(f"tune-{name}", lambda advance: rows[name])
    )
    reproduction = Reproduction(TOYS["llm"], 2, tmp_path)
    chosen, searched = comparison._settings(llm.TASK, TUNED, reproduction, {})
    assert searched == rows
    assert chosen.keys() == {"stacey_p2"}
    assert chosen["stacey_p2"][1]["optimizer.lr"] == 0.1


CHANGES = (ablation.BASE, "τ = 0", "z begins at 0", "m corrected for its bias")
TOYS = {
    "llm": Scale("a toy", 2, {"size": TUNED}),
    "cifar": Scale("a toy", 2, {"size": IMAGES}),
    "imagenet": Scale("a toy", 2, {"size": IMAGES_GIVEN}),
    "ablation": Scale("a toy", 2, {"overrides": {}, "without_data": {}, "changes": CHANGES}),
}


@pytest.fixture(autouse=True, scope="module")
def toys(configs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "configs", lambda: configs)
        patch.setattr(ablation, "configs", lambda: configs)
        for name, toy in TOYS.items():
            patch.setitem(registry.EXPERIMENTS[name].scales, "toy", toy)
        patch.setitem(registry.EXPERIMENTS["llm"].scales, "given", Scale("a toy", 2, {"size": GIVEN}))
        yield


@pytest.fixture(scope="module")
def undisturbed(toys, tmp_path_factory):
    """Return the directory of the small LLaMA's comparison."""
    directory = tmp_path_factory.mktemp("llm")
    reproduce("llm", directory)
    return directory


def reproduce(name, out, *options, scale="toy"):
    assert main(["reproduce", name, "--scale", scale, "--out", str(out), *options]) == 0
    return json.loads((out / "results.json").read_text())


def without_times(results):
    """Return the results, but for what depends on the clock."""
    if isinstance(results, dict):
        return {name: without_times(v) for name, v in results.items() if name not in ("time_per_update", "versions")}
    return [without_times(value) for value in results] if isinstance(results, list) else results


FIGURES = {
    "llm": {"curves", "search", "p"},
    "cifar": {"curves", "search"},
    "imagenet": {"curves"},
    "ablation": {"ablation"},
}


@pytest.mark.exhaustive
def test_long_runs_have_the_better_of_two_settings(configs, tmp_path, monkeypatch):
    size = {"optimizers": ("adamw", "stacey_pp", "lion"), "proxies": 2, "proxy": {"train.max_steps": 4}, "wsd": True}
    monkeypatch.setattr(long, "configs", lambda: configs)
    monkeypatch.setitem(registry.EXPERIMENTS["long"].scales, "toy", Scale("a toy", 2, size))
    results = reproduce("long", tmp_path)
    found = results["optimizers"]
    assert found.keys() == {"adamw", "stacey_pp", "lion"}
    for name, rates in (("adamw", ["lr"]), ("lion", ["lr"]), ("stacey_pp", ["lr", "tau"])):
        runs = {label: tmp_path / "runs" / f"{name}-{label}-seed0" for label in ("as-found", "halved")}
        losses = {label: rows(run)[-1]["eval_loss"] for label, run in runs.items()}
        used = {label: yaml.safe_load((run / "config.yaml").read_text()) for label, run in runs.items()}
        best = used[min(losses, key=losses.get)]["optimizer"]
        for rate in rates:
            assert used["halved"]["optimizer"][rate] == used["as-found"]["optimizer"][rate] / 2
            assert found[name]["settings"][f"optimizer.{rate}"] == best[rate]
        assert found[name]["settings"].items() >= {"optimizer.name": best["name"]}.items()
        assert rows(tmp_path / "tuning" / name / "trial-000")[-1]["step"] == 4
        for seed, final in zip((1, 2), found[name]["finals"], strict=True):
            assert rows(tmp_path / "runs" / f"{name}-seed{seed}")[-1]["eval_loss"] == final
    assert results["wsd"].keys() == {"adamw", "stacey_pp"}
    for name, loss in results["wsd"].items():
        run = tmp_path / "runs" / f"{name}-wsd-seed1"
        assert yaml.safe_load((run / "config.yaml").read_text())["schedule"]["name"] == "wsd"
        assert rows(run)[-1]["eval_loss"] == loss
    assert "| with wsd, seed 1 | held-out loss |" in (tmp_path / "table.md").read_text()
    assert {"curves.png", "time.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # All are made of the same parts: the LLaMA's has each of them.
    [pytest.param(name, marks=() if name == "llm" else pytest.mark.exhaustive) for name in TOYS],
)
def test_end_to_end(name, tmp_path, capsys, request):
    if name == "llm":
        tmp_path = request.getfixturevalue("undisturbed")
    results = reproduce(name, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert table in capsys.readouterr().out
    assert {file.stem for file in tmp_path.glob("*.png")} == FIGURES[name]
    for file in tmp_path.glob("*.png"):
        with Image.open(file) as figure:
            assert figure.width > 500
    if name == "ablation":
        assert results["losses"].keys() == set(CHANGES)
        base = results["losses"][ablation.BASE]
        assert all(losses != base for label, losses in results["losses"].items() if label != ablation.BASE)
        assert sum(line.startswith("| ") for line in table.splitlines()) == 1 + len(CHANGES)
        return
    metric = results["metric"]
    assert metric == ("eval_loss" if name == "llm" else "eval_top1")
    for optimizer, found in results["optimizers"].items():
        states = [trial["state"] for trial in found["tuning"]]
        assert len(states) == (0 if name == "imagenet" else 2)
        # The settings are the best trial's, and the runs are those of the launcher.
        best = found["tuning"][0]["settings"] if states else {}
        assert found["settings"].items() >= best.items()
        for seed, final in zip((1, 2), found["finals"], strict=True):
            run = tmp_path / "runs" / f"{optimizer}-seed{seed}"
            assert rows(run)[-1][metric] == final
            config = yaml.safe_load((run / "config.yaml").read_text())
            assert config["seed"] == seed
            own = ImageOptimizerConfig(config["optimizer"]["name"], variant=config["optimizer"]["variant"])
            assert config["optimizer"]["lr"] == best.get("optimizer.lr", own.lr)
        if states:
            run = tmp_path / "tuning" / optimizer / "trial-000" / "config.yaml"
            assert yaml.safe_load(run.read_text())["seed"] == 0


@pytest.mark.exhaustive
def test_settings_that_are_given_are_not_tuned(configs, tmp_path):
    results = reproduce("llm", tmp_path / "out", scale="given")
    final = results["optimizers"]["stacey_p2"]["finals"][0]
    launch("--config", configs / "presets" / "llama_p2.yaml", "--seed", 1, "--run_dir", tmp_path / "launched")
    assert rows(tmp_path / "launched")[-1]["eval_loss"] == final
    assert not (tmp_path / "out" / "tuning").exists()
    assert not (tmp_path / "out" / "search.png").exists()


KILLED = """
import sys
from pathlib import Path
from experiments.__main__ import main
from experiments import comparison, registry
from tests.experiments.test_comparison import TOYS

configs, out = map(Path, sys.argv[1:])
comparison.configs = lambda: configs
registry.EXPERIMENTS["llm"].scales["toy"] = TOYS["llm"]
sys.exit(main(["reproduce", "llm", "--scale", "toy", "--out", str(out), "--workers", "2"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "file"),
    [
        pytest.param(signal.SIGKILL, "tuning/stacey_p2/trial-001/metrics.jsonl", marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGINT, "runs/adamw-seed1/metrics.jsonl", marks=pytest.mark.exhaustive),
    ],
)
def test_killed_in_the_middle_it_gives_the_same_table(configs, undisturbed, tmp_path, number, file):
    killed = tmp_path / "killed"
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(configs), str(killed)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as started:
        while not (killed / file).exists():
            assert started.poll() is None, started.stderr.read()
            time.sleep(0.01)
        os.killpg(started.pid, number)
        _, said = started.communicate(timeout=60)
    assert started.returncode == (130 if number == signal.SIGINT else -number), said
    if number == signal.SIGINT:
        assert "Traceback" not in said
        assert said.endswith("experiments: interrupted; the same command resumes\n")
    assert not (killed / "table.md").exists()
    assert without_times(reproduce("llm", killed)) == without_times(reproduce("llm", undisturbed))


@pytest.mark.exhaustive
def test_training_ends_with_a_process_that_is_killed_alone(tmp_path):
    """Else a second start would find its predecessor's runs still writing."""
    configs, out = write_sweeps(tmp_path), tmp_path / "out"
    base = configs / "sweeps" / "llm" / "base.yaml"
    settings = yaml.safe_load(base.read_text())
    settings["train"]["max_steps"] = 1_000_000  # runs that do not end by themselves
    base.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-c", KILLED, str(configs), str(out)]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) as started:
        while not list(out.glob("tuning/*/*/metrics.jsonl")):
            assert started.poll() is None
            time.sleep(0.01)
        others = psutil.Process(started.pid).children(recursive=True)
        assert len(others) >= 2  # the server and a run
        started.kill()
    alive = still_running(others, 30)
    for process in alive:
        process.kill()
    assert not alive


def test_data_of_the_users_own(configs, tmp_path, monkeypatch):
    """--data takes the place of what the configuration names, for both launchers."""
    made = []
    monkeypatch.setattr(comparison, "training", lambda r, program, config, settings, name: made.append(settings))
    monkeypatch.setattr(comparison, "report", None)
    for name, setting in (("llm", "data.files"), ("cifar", "data.path")):
        experiment = registry.EXPERIMENTS[name]
        monkeypatch.setitem(experiment.scales, "toy", Scale("a toy", 2, {"size": GIVEN}))
        made.clear()
        with pytest.raises(AttributeError):  # nothing is trained here
            main(["reproduce", name, "--scale", "toy", "--out", str(tmp_path / name), "--data", "some,where"])
        assert all(settings["data.dataset"] is None for settings in made)
        assert {str(settings[setting]) for settings in made} == {"['some', 'where']" if name == "llm" else "some,where"}


def assert_valid(settings, config):
    launcher = LAUNCHERS["train_imagenet.py" if config.parent.name == "cifar" else "train_llm.py"]
    launcher.parse(Trial("", config, settings, Path("run")).arguments())


@pytest.mark.parametrize("scale", ["cpu", pytest.param("gpu", marks=pytest.mark.exhaustive)])
def test_every_change_of_the_ablation_is_a_valid_configuration(scale):
    size = registry.EXPERIMENTS["ablation"].scales[scale].settings
    for change in size["changes"]:
        settings = {**size["overrides"], **size["without_data"], **ablation.CHANGES[change]}
        assert_valid(settings, ROOT / "configs/sweeps/llm/base.yaml")


def test_every_scale_finds_its_configurations():
    """Those in the repository, that is."""
    for name in ("llm", "cifar", "imagenet"):
        for scale_name, scale in registry.EXPERIMENTS[name].scales.items():
            if scale_name in ("toy", "given"):
                continue
            size = scale.settings["size"]
            if size.sweeps is not None:
                assert_valid({**size.overrides, **size.without_data}, ROOT / "configs" / size.sweeps / "base.yaml")
            for optimizer in size.optimizers:
                if size.sweeps is not None:
                    assert (ROOT / "configs" / size.sweeps / f"{optimizer}.yaml").is_file()
                else:
                    short = optimizer.removeprefix("stacey_")
                    config = yaml.safe_load((ROOT / "configs" / size.configs.format(short)).read_text())
                    assert short in (config["optimizer"]["name"], config["optimizer"].get("variant"))
