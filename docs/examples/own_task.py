"""Train a model and data of your own: accelerate launch own_task.py --run_dir runs/own"""

from dataclasses import dataclass

import torch
from torch import nn

from stacey_dist.training import DatasetTask, Launcher, Parts, RunConfig


@dataclass
class Settings(RunConfig):
    """Fit a network to the product of two numbers."""

    hidden_size: int = 64
    """Neurons of each hidden layer."""


def prepare_data(run):
    inputs = torch.rand(5000, 2, generator=torch.Generator().manual_seed(0))
    samples = list(zip(inputs, inputs.prod(dim=1), strict=True))
    return samples[:4500], samples[4500:]


def build_model(run, data):
    size = run.config.hidden_size
    hidden = [nn.Linear(2, size), nn.GELU(), nn.Linear(size, size), nn.GELU()]
    return nn.Sequential(*hidden, nn.Linear(size, 1))


class Regression(DatasetTask):
    def losses(self, model, batch):
        inputs, targets = batch
        return (model(inputs).squeeze(1) - targets).square()


parts = Parts(prepare_data, build_model, Regression)
launcher = Launcher("own_task.py", Settings, lambda: parts)
if __name__ == "__main__":
    launcher.main()
