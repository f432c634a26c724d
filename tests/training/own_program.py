"""A program of a user's own: a linear regression, with a task, settings and a model that are no part of the package.

EVENTS=FILE appends what its callback is told to FILE.RANK. FAIL=N has the callback fail after update N.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from stacey_dist.training import Callback, Launcher, Parts, RunConfig, Task
from stacey_dist.training.settings.value_types import PositiveInt, check


@dataclass
class ModelConfig:
    """The model to fit."""

    features: PositiveInt = 5
    """How many inputs it has."""


@dataclass
class RegressionConfig(RunConfig):
    """Fit a line."""

    model: ModelConfig = field(default_factory=ModelConfig)

    def check_rules(self):
        super().check_rules()
        check(self.model.features != 13, "model.features", 13, "it brings bad luck")


class Regression(Task):
    unit = "points"
    flops_per_unit = 60.0
    data_identity = "points on a plane"
    samples_per_epoch = 100

    def __init__(self, run, data, model):
        self.run, self.data = run, data
        self.batch_size = run.config.train.global_batch_size

    def micro_batches(self, position):
        size = self.run.micro_batch_size
        first = position + self.run.accelerator.process_index * self.run.process_batch_size
        for start in range(first, first + self.run.process_batch_size, size):
            rows = torch.arange(start, start + size) % len(self.data)
            yield self.data[rows]

    def units(self, position):
        return self.batch_size

    def loss(self, model, batch):
        return (model(batch[:, :-1]).squeeze(1) - batch[:, -1]).square().sum() / self.batch_size

    def evaluate(self, model, stopping):
        return {"eval_loss": float((model(self.data[:, :-1]).squeeze(1) - self.data[:, -1]).square().mean())}

    def score(self, figures):
        return -figures["eval_loss"]

    def close(self):
        print("closed", flush=True)


class Recorder(Callback):
    """Writes down what it is told, and what it is shown then."""

    def note(self, event, training, *more):
        if path := os.environ.get("EVENTS"):
            outcome = training.outcome
            seen = [event, training.step, None if outcome is None else list(outcome), training.lr, *more]
            with open(f"{path}.{os.environ.get('RANK', '0')}", "a") as file:
                file.write(json.dumps(seen) + "\n")

    def on_run_begin(self, training):
        self.note("run begins", training)

    def on_update_begin(self, training):
        self.note("update begins", training)

    def needs_outcome(self, step):
        return step == 7

    def on_update_end(self, training):
        self.note("update", training)
        if training.step == 6:
            training.wait_for_outcome()
        if str(training.step) == os.environ.get("FAIL"):
            raise RuntimeError("the callback's own")

    def on_evaluation_end(self, training, figures):
        self.note("evaluation", training, figures, training.engine.model.training)

    def on_checkpoint_saved(self, training, path):
        self.note("saved", training, path.name, (path / "manifest.json").exists())

    def on_run_end(self, training):
        self.note("run ends", training)


def prepare_data(run):
    generator = torch.Generator().manual_seed(run.config.seed)
    points = torch.randn(100, run.config.model.features, generator=generator)
    return torch.cat([points, points.sum(1, keepdim=True) + 1.0], dim=1)


def build_model(run, data):
    torch.manual_seed(run.config.seed)
    # A resumed run has to have the same random numbers.
    return nn.Sequential(nn.Dropout(0.02), nn.Linear(run.config.model.features, 1))


if __name__ == "__main__":
    parts = Parts(prepare_data, build_model, Regression)
    Launcher("own_program.py", RegressionConfig, lambda: parts, callbacks=[Recorder()]).main()
