"""The training loop: from the first update to the last, through evaluations, checkpoints and interruptions."""

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stacey_dist.errors import SettingsError
from stacey_dist.training.metrics import Metrics
from stacey_dist.training.optimizers import schedule, set_learning_rate
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


def train(run: Run, task: Task, model: nn.Module, optimizer: Optimizer) -> None:
    """Train `model` in place to `train.max_steps` updates, going on from the newest checkpoint of the run.

    Raises:
        SettingsError: the run's checkpoints do not fit the settings, or too many updates in a row were skipped.
        SystemExit: with 128 + the signal's number, after SIGTERM or Ctrl-C and a checkpoint.
    """
    config, accelerator = run.config, run.accelerator
    prepared_model, prepared_optimizer = accelerator.prepare(model, optimizer)
    start, skipped = restore(run, model, optimizer, task.data_identity)
    last = config.train.max_steps
    if start >= last:
        run.say(f"nothing to do: {run.directory} is complete with {start} updates")
        return
    run.write_config()
    metrics = Metrics(run, task.unit, task.flops_per_unit, start)
    skipped_in_a_row = 0
    model.train()
    with StopSignal() as stop:
        for step in range(start, last):
            lr = config.optimizer.lr * _lr_share(run, step)
            set_learning_rate(optimizer, lr)
            loss = torch.zeros((), device=accelerator.device)
            for batch, last_of_update in _mark_last(task.micro_batches(step)):
                # Gradients are averaged over processes once, with the last micro-batch.
                if last_of_update:
                    share = _backward(run, task, prepared_model, batch)
                else:
                    with accelerator.no_sync(prepared_model):
                        share = _backward(run, task, prepared_model, batch)
                loss += share
            norm = _clip(run, prepared_model)
            loss_value, grad_norm, stopping = _agree(run, loss, norm, stop.received is not None)
            if math.isfinite(loss_value) and math.isfinite(grad_norm):
                prepared_optimizer.step()
                skipped_in_a_row = 0
            else:
                prepared_optimizer.zero_grad()
                if accelerator.scaler is not None:
                    prepared_optimizer.step()  # without gradients it changes nothing; the scaler hears of overflow
                skipped += 1
                skipped_in_a_row += 1
                if skipped_in_a_row > config.train.max_skipped_steps:
                    raise SettingsError(
                        f"train.max_skipped_steps: {skipped_in_a_row} updates in a row up to update {step + 1} had a "
                        f"loss or gradient that is not finite (loss {loss_value}, gradient norm {grad_norm}); "
                        "lower optimizer.lr, or look at the data"
                    )
            prepared_optimizer.zero_grad()
            done = step + 1
            metrics.step(done, task.units(step), loss=loss_value, lr=lr, grad_norm=grad_norm, skipped=skipped)
            metrics.pause()
            if done == last or done % config.train.eval_every_steps == 0:
                metrics.evaluation(done, _evaluate(task, model))
            if stopping or done == last or done % config.train.eval_every_steps == 0:
                metrics.plot()
            if stopping or done == last or done % config.checkpoint.every_steps == 0:
                path = save(
                    run,
                    done,
                    model,
                    optimizer,
                    data_identity=task.data_identity,
                    skipped=skipped,
                    must_succeed=stopping or done == last,
                )
                if path is not None and (stopping or done == last):
                    metrics.say(f"saved {path}")
            if stopping:
                number = int(stop.received or 15)
                accelerator.end_training()
                run.say(f"stopped by signal {number} after update {done}; the same command goes on from here")
                sys.exit(128 + number)
            metrics.go_on()


def _lr_share(run: Run, step: int) -> float:
    config = run.config
    return schedule(
        step,
        config.schedule.name,
        warmup_steps=config.schedule.warmup_steps,
        max_steps=config.train.max_steps,
        min_lr_ratio=config.schedule.min_lr_ratio,
    )


def _backward(run: Run, task: Task, model: nn.Module, batch: Any) -> Tensor:
    loss = task.loss(model, batch)
    # Data parallelism averages gradients over processes; the shares of the loss are to be summed.
    run.accelerator.backward(loss * run.accelerator.num_processes)
    return loss.detach()


def _clip(run: Run, model: nn.Module) -> Tensor:
    """Clip the gradients and return their norm before clipping, the same on every process."""
    limit = run.config.train.max_grad_norm or math.inf
    norm = run.accelerator.clip_grad_norm_(model.parameters(), limit)
    assert norm is not None
    return norm


def _agree(run: Run, loss: Tensor, grad_norm: Tensor, stopping: bool) -> tuple[float, float, bool]:
    """The update's loss over all processes, its gradient norm, and whether any process was told to stop.

    One small all-reduce, and the update's one wait for the device.
    """
    shared = torch.stack([loss, torch.full_like(loss, float(stopping))])
    if run.accelerator.num_processes > 1:
        torch.distributed.all_reduce(shared)
    loss_value, stop, norm = torch.cat([shared, grad_norm.to(shared).reshape(1)]).tolist()
    return loss_value, norm, stop > 0


def _evaluate(task: Task, model: nn.Module) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        figures = task.evaluate(model)
    model.train()
    return figures


def _mark_last(batches: Sequence[Any]) -> Iterator[tuple[Any, bool]]:
    for index, batch in enumerate(batches):
        yield batch, index == len(batches) - 1
