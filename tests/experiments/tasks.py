"""Comparisons and searches that take seconds: a tiny LLaMA and a tiny ResNet, with a sweep for each optimizer."""

import shutil

import yaml

from experiments.comparison import Size
from tests.training.forked import ROOT
from tests.training.helpers import write_config, write_image_config

SHORT = {"max_steps": 6, "eval_every_steps": 2, "log_every_steps": 2}
STEPS = SHORT["max_steps"]


def write_sweeps(directory):
    """configs/sweeps and configs/presets in `directory`, as the repository has them, of tiny runs."""
    for name in ("llm", "images"):
        (directory / name).mkdir()
    llm = write_config(directory / "llm", train=SHORT, checkpoint={})
    images = write_image_config(directory / "images", train=SHORT, checkpoint={})
    for task, config in (("llm", llm), ("long", llm), ("cifar", images)):
        target = directory / "configs" / "sweeps" / task
        shutil.copytree(ROOT / "configs" / "sweeps" / task, target)
        settings = yaml.safe_load(config.read_text())
        settings["optimizer"] = {"weight_decay": 0.1}
        (target / "base.yaml").write_text(yaml.safe_dump(settings))
        for sweep in target.glob("[!b]*.yaml"):
            text = sweep.read_text()
            sweep.write_text(text.replace(f"configs/sweeps/{task}/base.yaml", str(target / "base.yaml")))
    presets = directory / "configs" / "presets"
    presets.mkdir()
    for name, config in (("llama_adamw", llm), ("llama_p2", llm), ("resnet_sgd", images), ("resnet_pp", images)):
        short = name.split("_")[1]
        optimizer = {"name": "stacey", "variant": short} if short in ("p2", "pp") else {"name": short}
        settings = yaml.safe_load(config.read_text()) | {"optimizer": optimizer}
        (presets / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return directory / "configs"


TUNED = Size(optimizers=("adamw", "stacey_p2"), sweeps="sweeps/llm", trials=2, vary_p={"stacey_p2": (2, 30)})
IMAGES = Size(optimizers=("adamw", "stacey_2p"), sweeps="sweeps/cifar", trials=2)
IMAGES_GIVEN = Size(optimizers=("sgd", "stacey_pp"), configs="presets/resnet_{}.yaml")
GIVEN = Size(optimizers=("adamw", "stacey_p2"), configs="presets/llama_{}.yaml")
