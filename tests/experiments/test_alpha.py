"""The experiment on a growing alpha, end to end at a toy scale."""

import json
import shutil
from pathlib import Path

import pytest

from experiments import alpha, framework, registry
from experiments.__main__ import main
from experiments.framework import Scale
from stacey_dist import yaml_files
from stacey_dist.training.launchers import LLM
from stacey_dist.training.settings.command_line import flatten, to_dict
from tests.experiments.tasks import write_sweeps


def test_alpha_grows_by_powers_of_e():
    size = registry.EXPERIMENTS["alpha"].scales["cpu"].settings
    first = size["runs"]["stacey_pp"]["optimizer.alpha"]
    _, *finals = size["final_alpha"]
    assert [final / first for final in finals] == pytest.approx([2.718281828**power for power in (3, 10, 30)], rel=0.01)


def test_the_configuration_for_long_runs_has_what_was_measured():
    config = LLM.parse(["--config", str(framework.configs() / "llm/long_run.yaml")])
    measured = dict(registry.EXPERIMENTS["alpha"].scales["cpu"].settings["runs"]["stacey_pp_growing"])
    base = yaml_files.read(framework.configs() / "sweeps/long/base.yaml")
    values = flatten(to_dict(config))
    assert list(config.optimizer.betas) == measured.pop("optimizer.betas")
    for name, value in measured.items():
        assert values[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3)), name
    assert config.schedule.warmup_updates(10_000) == base["schedule"]["warmup_steps"]
    assert (config.schedule.name, config.schedule.min_lr_ratio) == ("linear", 0.0)


def test_a_run_that_diverged_is_told_in_both(monkeypatch):
    """As parts that were made: one of the short runs has diverged."""

    def made(self, *groups):
        return [
            {
                key: {
                    "evaluations": [] if "e+11" in part.name else [{"step": 1, "eval_loss": 2.0}],
                    "diverged": "e+11" in part.name,
                    "seconds_per_update": 1.0,
                    "state_bytes_per_parameter": 4.0,
                    "threads": 1,
                }
                for key, part in parts.items()
            }
            for parts in groups
        ]

    monkeypatch.setattr(framework.Reproduction, "compute", made)
    scale = registry.EXPERIMENTS["alpha"].scales["cpu"]
    outcome = alpha.run(framework.Reproduction(scale, 2, Path("unused"), 1, None))
    assert [*outcome.results["short"].values()] == [2.0, 2.0, 2.0, 2.0, None]
    assert "| STACEY(p,p), α grows to 1.07e+11 | diverged |" in outcome.table
    framework.dump(outcome.results)


@pytest.mark.exhaustive
def test_end_to_end(tmp_path, monkeypatch):
    configs = write_sweeps(tmp_path)
    (configs / "llm").mkdir()
    shutil.copy(configs / "sweeps/long/base.yaml", configs / "llm/quickstart.yaml")
    monkeypatch.setattr(alpha, "configs", lambda: configs)
    pp = {"optimizer.name": "stacey", "optimizer.variant": "pp"}
    growing = {**pp, "schedule.final_alpha": 1.0}
    runs = {"adamw": {"optimizer.name": "adamw", "optimizer.lr": 2e-4}, "stacey_pp": pp, "stacey_pp_growing": growing}
    lengths = {"short": 20, "long": 30}
    quickstart = {"quickstart": {"stacey_pp_growing": {**pp, "schedule.final_alpha": 3.0}}}
    settings = {"runs": runs, "final_alpha": (None, 2.0), "controls": {"lower": ("adamw", 0.5)}}
    toy = Scale("a toy", 2, settings | lengths | quickstart)
    monkeypatch.setitem(registry.EXPERIMENTS["alpha"].scales, "toy", toy)
    assert main(["reproduce", "alpha", "--scale", "toy", "--out", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["seeds"] == results["short with new seeds"]["seeds"] == [1, 2]
    assert set(results["optimizers"]) == set(runs)
    assert set(results["controls"]) == {"lower"}
    assert set(results["short"]) == {"AdamW", "STACEY(p,p), α constant", "STACEY(p,p), α grows to 2"}
    finals = {
        name: yaml_files.read(tmp_path / "out/runs" / name / "config.yaml")["schedule"]["final_alpha"]
        for name in (
            "stacey_pp-alpha-20-seed0",
            "stacey_pp-alpha-to-2-20-seed0",
            "stacey_pp_growing-30-seed2",
            "quickstart-stacey_pp_growing-seed1",
        )
    }
    assert list(finals.values()) == [None, 2.0, 1.0, 3.0]
    assert set(results["quickstart"]["optimizers"]) == {"stacey_pp_growing"}
    assert yaml_files.read(tmp_path / "out/runs/adamw-rates-0.5-30-seed1/config.yaml")["optimizer"]["lr"] == 1e-4
    table = (tmp_path / "out/table.md").read_text()
    assert "| lower |" in table
    assert "| STACEY(p,p), α grows |" in table
    assert "| STACEY(p,p), α grows to 2 |" in table
