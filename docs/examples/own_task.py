"""Train a model and data of your own: `accelerate launch own_task.py --train.max_steps 200 --run_dir runs/own`."""

from dataclasses import dataclass

import torch
from torch import nn

from stacey_dist.training import DatasetTask, Launcher, Parts, RunConfig


@dataclass
class Settings(RunConfig):
    """Fit a network to a product of two numbers."""

    hidden_size: int = 64
    """Neurons of each hidden layer."""


def prepare_data(run):
    inputs = 2 * torch.rand(5000, 2, generator=torch.Generator().manual_seed(0)) - 1
    samples = list(zip(inputs, inputs.prod(dim=1, keepdim=True), strict=True))
    return samples[:4500], samples[4500:]


def build_model(run, data):
    size = run.config.hidden_size
    return nn.Sequential(nn.Linear(2, size), nn.GELU(), nn.Linear(size, size), nn.GELU(), nn.Linear(size, 1))


class Regression(DatasetTask):
    def losses(self, model, batch):
        inputs, targets = batch
        return (model(inputs) - targets).square().mean(dim=1)


if __name__ == "__main__":
    Launcher("own_task.py", Settings, lambda: Parts(prepare_data, build_model, Regression)).main()
