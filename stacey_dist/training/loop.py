"""The training loop: from the first update to the last, through evaluations, checkpoints and interruptions."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from stacey_dist.errors import DivergedError, StoppedWaitingError
from stacey_dist.training import signals
from stacey_dist.training.engine import Engine, Requests
from stacey_dist.training.metrics import Metrics
from stacey_dist.training.optimizers import scheduled
from stacey_dist.training.resume import restore
from stacey_dist.training.run import Run
from stacey_dist.training.saving import Saver, checkpoint_path, is_finite
from stacey_dist.training.signals import StopSignal

_ASK_EVERY = 4  # batches of an evaluation: asking waits for the device


class Task(Protocol):
    """What is trained: the data of each update, its loss, and how to judge the result."""

    unit: str
    """What the data is counted in, as in "tokens"."""
    flops_per_unit: float
    """Floating-point operations of forward and backward on one unit."""

    data_identity: str
    """Differs where the data do: a run is not resumed on other data."""

    batch_size: int
    """Samples of one update, over all processes."""

    samples_per_epoch: int
    """Samples of the training data."""

    def micro_batches(self, position: int) -> Iterable[Any]:
        """This process's micro-batches of the update whose first sample is at this global position.

        A function of the settings and the position.
        """
        ...

    def units(self, position: int) -> int:
        """Units that all processes together train on in the update at this global position."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The micro-batch's share of the update's loss: shares of all micro-batches and processes sum to the mean."""
        ...

    def evaluate(self, model: nn.Module, stopping: Callable[[], bool]) -> dict[str, float] | None:
        """Held-out figures, the same on every process.

        `stopping` is to be asked after each batch, as often on every process; where it is true there are none.
        """
        ...

    def score(self, figures: dict[str, float]) -> float:
        """How good such figures are: higher is better."""
        ...

    def close(self) -> None:
        """End what the task has started, as processes that read data. Called after the last update."""
        ...


def train(run: Run, task: Task, engine: Engine) -> Path:
    """Train the engine's model in place to `train.max_steps` updates, going on from the run's newest checkpoint.

    Returns the checkpoint of the last update.

    Raises:
        SettingsError: the run's checkpoints do not fit the settings, or
            run_dir was renamed or removed.
        DivergedError: too many updates in a row were skipped, or weights or states are not finite in the end.
        SystemExit: with 128 + the signal's number, after SIGTERM or Ctrl-C and a checkpoint.
    """
    config, accelerator = run.config, run.accelerator
    run.settle_length(task.samples_per_epoch)
    progress = restore(run, engine, task.data_identity)
    last = config.train.max_steps

    def is_evaluated(step: int) -> bool:
        return step == last or step % config.train.eval_every_steps == 0

    # A run that was told to stop leaves the evaluation for when it goes on.
    missed = progress.evaluated_step < progress.step <= last and is_evaluated(progress.step)
    if progress.step >= last and not missed:
        run.say(f"nothing to do: {run.directory} is complete with {progress.step} updates")
        return checkpoint_path(run, progress.step)
    run.write_config()
    metrics = Metrics(run, task.unit, task.flops_per_unit, progress)
    micro_batches = run.process_batch_size // run.micro_batch_size
    skipped_in_a_row = 0
    save_is_due = False
    engine.model.train()

    def stopping() -> bool:
        return engine.any_process(stop.received is not None)

    def evaluate() -> tuple[bool, bool]:
        """Whether it is the best so far, and whether it was left because a process was told to stop."""
        try:
            figures = _evaluate(task, engine, stopping)
        except StoppedWaitingError:
            if accelerator.num_processes > 1:
                raise
            engine.model.train()
            return False, True
        if figures is None:
            return False, True
        metrics.evaluation(progress.step, figures)
        progress.evaluated_step = progress.step
        return progress.improves(task.score(figures)), False

    def micro_batches_of_update() -> Iterator[Any]:
        """Yield them; one process that is told to stop and gets none saves what it has, and leaves.

        Of several, the others are in the middle of an update, which this one cannot finish: it ends with an error, and
        they with it.
        """
        try:
            yield from metrics.timed(task.micro_batches(progress.position))
        except StoppedWaitingError:
            if accelerator.num_processes > 1:
                raise
            engine.restore_statistics()
            metrics.say(f"saved {saver.save_surely(progress, delete_older=skipped_in_a_row == 0)}")
            metrics.plot(surely=True)
            leave()

    def leave() -> NoReturn:
        number = int(stop.received or 15)
        # Before the processes part: the first that is gone has the launcher stop the others, whatever they do.
        run.say(f"stopped by signal {number} after update {progress.step}; the same command goes on from here")
        engine.close()
        sys.exit(128 + number)

    with StopSignal() as stop, Saver(run, engine, task.data_identity) as saver:
        if missed:
            _, stopped = evaluate()
            if stopped:
                leave()
            if progress.step == last:  # the checkpoint says that it was evaluated, and which one was best
                metrics.say(f"saved {saver.save_surely(progress)}")
                metrics.plot(surely=True)
            metrics.go_on()
        while progress.step < last:
            settings = scheduled(config, progress.step, progress.skipped_steps)
            engine.set_group_settings(settings)
            engine.keep_statistics()
            loss = torch.zeros((), device=accelerator.device)
            for number, batch in enumerate(micro_batches_of_update(), start=1):
                signals.progress()
                with engine.micro_batch(last=number == micro_batches):
                    share = task.loss(engine.model, batch)
                    engine.backward(share)
                loss += share.detach()
            requests = Requests(
                stop.received is not None, saver.minutes_are_over, saver.keeps_failing, run.directory_is_gone()
            )
            update = engine.finish_update(loss, requests)
            units = task.units(progress.position)
            progress.step += 1
            progress.position += task.batch_size
            progress.skipped_steps += not update.applied
            if not update.applied:
                engine.restore_statistics()
            skipped_in_a_row = 0 if update.applied else skipped_in_a_row + 1
            if skipped_in_a_row > config.train.max_skipped_steps:
                run.fail(
                    f"train.max_skipped_steps: {skipped_in_a_row} updates in a row up to update {progress.step} had "
                    f"a loss or gradient that is not finite (loss {update.loss}, gradient norm {update.grad_norm}); "
                    f"lower optimizer.lr, or look at the data; {saver.what_is_left()}",
                    DivergedError,
                )
            saver.report()
            gone = update.requests.leave
            if gone:
                run.make_directory_again()
            epoch = progress.position / task.samples_per_epoch
            metrics.step(progress, units, epoch=epoch, loss=update.loss, lr=settings["lr"], grad_norm=update.grad_norm)
            metrics.pause()
            improved, stopped = False, update.requests.stop
            # Whoever asked for a stop kills soon: saving is first.
            evaluating = is_evaluated(progress.step) and not (stopped or gone)
            if evaluating:
                improved, stopped = evaluate()
            ending = stopped or gone or progress.step == last
            if ending and not gone and engine.any_process(run.directory_is_gone()):  # during the evaluation
                gone = True
                run.make_directory_again()
            best = improved and config.checkpoint.keep_best
            save_is_due |= update.requests.save or update.requests.save_surely or saver.is_due(progress.step)
            # Skipped updates may mean that the weights are ruined. A save that is due waits for one that is applied.
            # What has just been evaluated as the best is not ruined.
            if ending:
                metrics.say(f"saved {saver.save_surely(progress, delete_older=update.applied)}")
            elif best or (save_is_due and update.applied):
                save = saver.save_surely if update.requests.save_surely else saver.save
                save(progress, delete_older=update.applied)
                save_is_due = False
            if evaluating or ending:
                metrics.plot(surely=ending)
            if gone:
                metrics.flush()
                run.fail(
                    f"run_dir: {run.directory} was renamed or removed while the run went on. All of the training is "
                    f"in {checkpoint_path(run, progress.step)}, in a new directory of that name; the same command "
                    "goes on from there. Older checkpoints and metrics are where the old directory is, if it is"
                )
            if stopped:
                leave()
            metrics.go_on()
    if engine.any_process(metrics.flush() > 0):
        run.fail(
            f"run_dir: {metrics.path} could not be written to the end; the checkpoint of update {last} is complete"
        )
    if run.on_main(lambda: is_finite(checkpoint_path(run, last))) is False:
        run.fail(
            f"after the last update, {last}, the run has weights or optimizer states that are not finite; lower "
            f"optimizer.lr, or look at the data; {saver.what_is_left()}",
            DivergedError,
        )
    run.say(engine.state_report())
    return checkpoint_path(run, last)


def _evaluate(task: Task, engine: Engine, stopping: Callable[[], bool]) -> dict[str, float] | None:
    engine.share_buffers()
    engine.model.eval()
    batches = itertools.count(1)

    def asked() -> bool:
        signals.progress()
        return next(batches) % _ASK_EVERY == 0 and stopping()

    with torch.no_grad():
        figures = task.evaluate(engine.module, asked)
    engine.model.train()
    return figures
