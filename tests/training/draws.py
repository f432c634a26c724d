"""Build a run whose main process draws random numbers for its data; print the sum of the model's weights."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "docs/examples"))

import torch
from own_task import Regression, Settings, build_model, prepare_data

from stacey_dist.training import Launcher, Parts


def draw_and_prepare(run):
    run.call_on_main(lambda: torch.rand(int(os.environ["DRAWS"])).tolist())
    return prepare_data(run)


launcher = Launcher("draws.py", Settings, lambda: Parts(draw_and_prepare, build_model, Regression))

if __name__ == "__main__":
    built = launcher.build(launcher.parse(["--run_dir", sys.argv[1]]))
    total = sum(float(param.double().sum()) for param in built.engine.module.parameters())
    built.run.say(f"weights: {total!r}")
    built.engine.close()
