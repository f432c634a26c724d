"""Each optimizer's own numbers: chosen by its name, unless a number is given, and said in config.yaml."""

import dataclasses
import inspect
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch

from stacey_dist import yaml_files
from stacey_dist.training import optimizers
from stacey_dist.training.launchers import IMAGES, LLM, Launcher
from stacey_dist.training.run import Run
from stacey_dist.training.settings.command_line import to_dict
from stacey_dist.training.settings.config import OptimizerConfig, RunConfig
from stacey_dist.training.settings.image_config import ImageOptimizerConfig
from tests.training.forked import ROOT

KINDS = {name: get_type_hints(OptimizerConfig)[name] for name in ("name", "variant")}
METHODS = [
    (name, variant)
    for name in get_args(KINDS["name"])
    for variant in (get_args(KINDS["variant"]) if name == "stacey" else ["p2"])
]


CASES = [
    (config_class, name, variant)
    for config_class in (OptimizerConfig, ImageOptimizerConfig)
    for name, variant in METHODS
    if config_class is OptimizerConfig or name not in ("muon", "ademamix")  # which images refuse
]


@pytest.mark.parametrize(("config_class", "name", "variant"), CASES)
def test_the_table_has_what_each_optimizer_reads(config_class, name, variant):
    config = config_class(name, variant=variant)
    own = config_class.defaults[config.method]
    assert {key: getattr(config, key) for key in own} == own
    read = set()

    class Recording:
        def __getattr__(self, key):
            read.add(key)
            return getattr(config, key)

    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    optimizers.build_optimizer(model, Recording(), seed=0)
    assert read & set(OptimizerConfig.chosen) == own.keys()
    known = {each(n, variant=v).method for each, n, v in CASES if each is config_class}
    assert set(config_class.defaults) == known


def test_another_method_than_a_files_brings_its_own_numbers(tmp_path):
    """A file, such as a run's config.yaml, has the numbers of its own method: they are not those of another."""
    quickstart, written = str(ROOT / "configs/llm/quickstart.yaml"), tmp_path / "a.yaml"
    for options in (["--optimizer.variant", "pp"], ["--optimizer.name", "adamw"]):
        plain = LLM.parse(options)
        assert LLM.parse(["--config", quickstart, *options]).optimizer == plain.optimizer
        written.write_text(yaml_files.dump(to_dict(plain)))
        back = ["--optimizer.name", "stacey", "--optimizer.variant", "p2"]
        assert LLM.parse(["--config", str(written), *back]).optimizer == LLM.parse([]).optimizer
    written.write_text("optimizer: {lr: 0.0012, weight_decay: 0.2}\n")
    adamw = LLM.parse(["--config", str(written), "--optimizer.name", "adamw", "--optimizer.tau", "0.004"]).optimizer
    assert (adamw.lr, adamw.weight_decay) == (OptimizerConfig.defaults["adamw"]["lr"], 0.2)
    given = LLM.parse(["--config", quickstart, "--optimizer.name", "adamw", "--optimizer.lr", "0.0012"]).optimizer
    assert given.lr == 0.0012


def test_a_name_alone_brings_its_numbers_and_a_given_one_wins(tmp_path):
    lr, betas = (OptimizerConfig.defaults["adamw"][key] for key in ("lr", "betas"))
    assert (lr, betas) != (OptimizerConfig().lr, OptimizerConfig().betas)
    chosen = LLM.parse(["--optimizer.name", "adamw"]).optimizer
    assert (chosen.lr, chosen.betas) == (lr, betas)
    assert OptimizerConfig(name="adamw") == chosen  # from Python, too
    file = tmp_path / "a.yaml"
    file.write_text("optimizer: {name: sgd, lr: 0.5}\n")
    of_file = LLM.parse(["--config", str(file), "--optimizer.name=adamw", "--optimizer.weight_decay=0"]).optimizer
    assert (of_file.lr, of_file.betas, of_file.weight_decay) == (0.5, betas, 0.0)
    stacey_lr = OptimizerConfig().lr
    assert LLM.parse(["--optimizer.name", "adamw", f"--optimizer.lr={stacey_lr}"]).optimizer.lr == stacey_lr
    pp = LLM.parse(["--optimizer.variant", "pp"]).optimizer
    assert (pp.alpha, pp.tau) == tuple(OptimizerConfig.defaults["stacey pp"][key] for key in ("alpha", "tau"))
    images = IMAGES.parse(["--optimizer.name", "adamw"]).optimizer
    assert images.lr == ImageOptimizerConfig.defaults["adamw"]["lr"] != lr


@dataclasses.dataclass
class OwnConfig(RunConfig):
    """A program's own settings."""

    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(lr=0.5, p=3.0))


def test_a_programs_own_numbers_are_those_of_its_optimizer():
    launcher = Launcher("own.py", OwnConfig, lambda: None)
    assert launcher.parse([]).optimizer == OptimizerConfig(lr=0.5, p=3.0)
    assert launcher.parse(["--optimizer.p", "4"]).optimizer == OptimizerConfig(lr=0.5, p=4.0)
    assert launcher.parse(["--optimizer.name", "lion"]).optimizer == OptimizerConfig("lion")


def test_config_yaml_says_where_numbers_come_from_and_resumes_with_them(tmp_path, monkeypatch):
    config = LLM.parse(["--optimizer.name", "adamw", "--optimizer.lr", "0.01", "--run_dir", str(tmp_path)])
    Run(config, SimpleNamespace(num_processes=1, is_main_process=True)).write_config()
    path = tmp_path / "config.yaml"
    lines = [line.strip() for line in path.read_text().splitlines()]
    assert "lr: 0.01" in lines
    assert "weight_decay: 0.1  # default of adamw" in lines
    assert "betas:  # default of adamw" in lines
    assert "tau: 0.004  # adamw does not read it" in lines
    assert LLM.parse(["--config", str(path)]) == config
    # Another version may have other defaults: the run keeps its own.
    other = {**OptimizerConfig.defaults, "adamw": {"lr": 9.0, "weight_decay": 9.0, "betas": (0.1, 0.2)}}
    monkeypatch.setattr(OptimizerConfig, "defaults", other)
    assert LLM.parse(["--config", str(path)]) == config
    assert LLM.parse(["--optimizer.name", "adamw"]).optimizer.lr == 9.0


def test_a_comment_stands_behind_its_setting_alone():
    value = {"a": {"lr": 1, "b": [1, {"lr": 2}]}, "lr": 3, "c": {"lr": 4, "text": "x\n  lr: 5"}}
    text = yaml_files.dump(value, {"a.lr": "here"})
    assert text == yaml_files.dump(value).replace("lr: 1", "lr: 1  # here")
    assert yaml_files.load(text, "") == value


def test_what_is_chosen_is_what_may_be_left_out():
    defaults = {f.name: f.default for f in dataclasses.fields(OptimizerConfig)}
    assert {name for name, value in defaults.items() if value is None} == set(OptimizerConfig.chosen)
    assert "None" not in str(inspect.signature(OptimizerConfig).parameters["eps"])
