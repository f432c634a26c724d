"""The launcher's step against a bare PyTorch loop of the same model, batches and optimizer, step by step in turns.

    python benchmarks/training_loop.py [--steps N]

The launcher's step is all that lies between two updates of `stacey_dist.training.loop.train` at the quickstart's
settings: data, schedule, clipping, the checks, the progress line, metrics.jsonl. The bare loop has its batches as
tensors beforehand and reads its loss once a step.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from measure import median_and_minimum
from torch import nn

from stacey_dist.info import machine
from stacey_dist.training.launchers import LLM
from stacey_dist.training.loop import train
from stacey_dist.training.optimizers import build_optimizer
from stacey_dist.training.settings.llm_config import LLMConfig
from stacey_dist.training.tasks import llm
from stacey_dist.training.tasks.text_data import TextData


class BareLoop:
    """What one writes without a library."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float) -> None:
        self.model, self.optimizer, self.max_grad_norm = model, optimizer, max_grad_norm

    def step(self, inputs: torch.Tensor, labels: torch.Tensor, precision: str = "no") -> torch.Tensor:
        """An update, whose loss stays on the device."""
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = self.model(input_ids=inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


class InTurns(llm.LanguageModeling):
    """The launcher's task; before each of its steps the bare loop takes one."""

    def __init__(self, run: Any, data: TextData, model: Any, steps: int) -> None:
        super().__init__(run, data, model)
        config, twin = run.config, deepcopy(model)
        optimizer = build_optimizer(twin, config.optimizer, config.seed)
        self.bare = BareLoop(twin, optimizer, config.train.max_grad_norm)
        self.batches = [next(super(InTurns, self).micro_batches(step * self.batch_size)) for step in range(steps)]
        self.launcher_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.since = 0.0

    def micro_batches(self, position: int) -> Iterator[llm.TokenBatch]:
        begin = time.perf_counter()
        if position:
            self.launcher_seconds.append(begin - self.since)
        batch = self.batches[position // self.batch_size]
        self.bare.step(batch.inputs, batch.labels).item()
        self.since = time.perf_counter()
        self.bare_seconds.append(self.since - begin)
        return super().micro_batches(position)

    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float]:
        return {"eval_loss": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    config = LLMConfig()
    config.train.max_steps = config.checkpoint.every_steps = steps
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        config.run_dir = directory
        parts = replace(llm.PARTS, task=partial(InTurns, steps=steps))
        built = replace(LLM, load_parts=lambda: parts).build(config)
        train(built.run, built.task, built.engine)
        task: Any = built.task
    skip = min(10, steps // 2)  # the first steps warm up
    launcher, bare_loop = task.launcher_seconds[skip:], task.bare_seconds[skip:-1]
    print(machine())
    print(f"quickstart's model and batch, {len(launcher)} steps in turns; ms a step     median   minimum")
    print(f"  stacey_dist.training.loop   {'':40}{median_and_minimum(launcher, 1e-3)}")
    print(f"  bare PyTorch loop           {'':40}{median_and_minimum(bare_loop, 1e-3)}")
    medians = statistics.median(launcher) / statistics.median(bare_loop) - 1
    pairs = statistics.median(a / b for a, b in zip(launcher, bare_loop, strict=True)) - 1
    print(f"overhead: {medians:+.2%} of medians, {min(launcher) / min(bare_loop) - 1:+.2%} of minima, ", end="")
    print(f"{pairs:+.2%} median of the steps' own ratios")


if __name__ == "__main__":
    main()
