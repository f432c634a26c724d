"""The training loop: from the first update to the last, through evaluations, checkpoints and interruptions."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stacey_dist.errors import SettingsError
from stacey_dist.training.engine import Engine
from stacey_dist.training.metrics import Metrics
from stacey_dist.training.optimizers import schedule
from stacey_dist.training.resume import restore, save
from stacey_dist.training.run import Run
from stacey_dist.training.signals import StopSignal


class Task(Protocol):
    """What is trained: the data of each update, its loss, and how to judge the result."""

    unit: str
    """What the data is counted in, as in "tokens"."""
    flops_per_unit: float
    """Floating-point operations of forward and backward on one unit."""

    data_identity: str
    """Differs where the data do: a run is not resumed on other data."""

    def micro_batches(self, step: int) -> Sequence[Any]:
        """This process's micro-batches of update number `step` (from 0): a function of the settings and `step`."""
        ...

    def units(self, step: int) -> int:
        """Units that all processes together train on in update `step`."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The micro-batch's share of the update's loss: shares of all micro-batches and processes sum to the mean."""
        ...

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Held-out figures, the same on every process."""
        ...


def train(run: Run, task: Task, engine: Engine) -> None:
    """Train the engine's model in place to `train.max_steps` updates, going on from the run's newest checkpoint.

    Raises:
        SettingsError: the run's checkpoints do not fit the settings, or too many updates in a row were skipped.
        SystemExit: with 128 + the signal's number, after SIGTERM or Ctrl-C and a checkpoint.
    """
    config, accelerator = run.config, run.accelerator
    start, skipped = restore(run, engine, task.data_identity)
    last = config.train.max_steps
    if start >= last:
        run.say(f"nothing to do: {run.directory} is complete with {start} updates")
        return
    run.write_config()
    metrics = Metrics(run, task.unit, task.flops_per_unit, start)
    skipped_in_a_row = 0
    engine.model.train()
    with StopSignal() as stop:
        for step in range(start, last):
            lr = config.optimizer.lr * _lr_share(run, step)
            engine.set_learning_rate(lr)
            loss = torch.zeros((), device=accelerator.device)
            for batch, last_of_update in _mark_last(task.micro_batches(step)):
                with engine.micro_batch(last_of_update):
                    share = task.loss(engine.model, batch)
                    engine.backward(share)
                loss += share.detach()
            update = engine.finish_update(loss, stop.received is not None, config.train.max_grad_norm)
            skipped_in_a_row = 0 if update.applied else skipped_in_a_row + 1
            skipped += not update.applied
            if skipped_in_a_row > config.train.max_skipped_steps:
                raise SettingsError(
                    f"train.max_skipped_steps: {skipped_in_a_row} updates in a row up to update {step + 1} had a "
                    f"loss or gradient that is not finite (loss {update.loss}, gradient norm {update.grad_norm}); "
                    "lower optimizer.lr, or look at the data"
                )
            done, stopping = step + 1, update.stopping
            metrics.step(done, task.units(step), loss=update.loss, lr=lr, grad_norm=update.grad_norm, skipped=skipped)
            metrics.pause()
            if done == last or done % config.train.eval_every_steps == 0:
                metrics.evaluation(done, _evaluate(task, engine))
            if stopping or done == last or done % config.train.eval_every_steps == 0:
                metrics.plot()
            if stopping or done == last or done % config.checkpoint.every_steps == 0:
                path = save(
                    run,
                    engine,
                    done,
                    data_identity=task.data_identity,
                    skipped=skipped,
                    must_succeed=stopping or done == last,
                )
                if path is not None and (stopping or done == last):
                    metrics.say(f"saved {path}")
            if stopping:
                number = int(stop.received or 15)
                engine.close()
                run.say(f"stopped by signal {number} after update {done}; the same command goes on from here")
                sys.exit(128 + number)
            metrics.go_on()
    run.say(engine.state_report())


def _lr_share(run: Run, step: int) -> float:
    config = run.config
    return schedule(
        step,
        config.schedule.name,
        warmup_steps=config.schedule.warmup_steps,
        max_steps=config.train.max_steps,
        min_lr_ratio=config.schedule.min_lr_ratio,
    )


def _evaluate(task: Task, engine: Engine) -> dict[str, float]:
    engine.model.eval()
    with torch.no_grad():
        figures = task.evaluate(engine.module)
    engine.model.train()
    return figures


def _mark_last(batches: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
    for index, batch in enumerate(batches):
        yield batch, index == len(batches) - 1
