"""The training loop: from the first update to the last, through evaluations, checkpoints and interruptions."""

import hashlib
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from stacey_dist.errors import DivergedError, StoppedWaitingError
from stacey_dist.training.callbacks import Callback, Training
from stacey_dist.training.engine import Engine
from stacey_dist.training.optimizers import depends_on_skipped, scheduled
from stacey_dist.training.processes import signals
from stacey_dist.training.processes.requests import Requests
from stacey_dist.training.processes.signals import StopSignal
from stacey_dist.training.progress import Progress
from stacey_dist.training.reports.metrics import Metrics
from stacey_dist.training.reports.requested import callbacks_of
from stacey_dist.training.resume import restore
from stacey_dist.training.run import Run
from stacey_dist.training.saving import Saver, checkpoint_path, is_finite
from stacey_dist.training.task import Task

_ASK_EVERY = 4  # batches of an evaluation: asking waits for the other processes
_READ_EVERY = 1000  # updates, however seldom a line is due


def train(
    run: Run[Any], task: Task, engine: Engine, *, callbacks: Sequence[Callback] = (), until: int | None = None
) -> Path:
    """Train the engine's model in place to `train.max_steps` updates, from the run's newest checkpoint if it has one.

    All processes call it together. Called again, it trains on.

    Args:
        run: the run, as `Launcher.build` starts it.
        task: the data, the loss and the evaluation.
        engine: the model and its optimizer.
        callbacks: further callbacks, called after those that write the run's metrics and plots.
        until: the update to stop after, with a checkpoint. None: the last.

    Returns:
        The newest checkpoint.

    Raises:
        ValueError: `until` is no update.
        SettingsError: the run's checkpoints do not fit the settings, or run_dir was renamed or removed.
        DivergedError: too many updates in a row were skipped, or weights or states are not finite in the end.
        SystemExit: with 128 + the signal's number, after SIGTERM or Ctrl-C and a checkpoint.
    """
    if until is not None and until < 1:
        raise ValueError(f"until: {until} is not allowed; updates are numbered from 1")
    progress = restore(run, engine, task)
    trainer = _Trainer(run, task, engine, progress, callbacks, until)
    if progress.step >= trainer.stop_step and not trainer.evaluation_is_missing():
        complete = "is complete with" if progress.step >= trainer.last_step else "has"
        run.say(f"nothing to do: {run.directory} {complete} {progress.step} updates")
        saved = checkpoint_path(run, progress.step)
        return saved if saved.exists() else Path(run.config.checkpoint.resume_from or saved)
    run.write_config()
    run.write_processor()
    trainer.call_callbacks("on_run_begin")
    with trainer.stop, trainer.saver:
        if trainer.evaluation_is_missing():
            trainer.evaluate_resumed_update()
        trainer.clock.resume()
        while progress.step < trainer.stop_step:
            requests = trainer.train_step()
            trainer.after_step(requests)
        trainer.end()
    trainer.check_result()
    run.say(engine.state_report())
    return checkpoint_path(run, progress.step)


class _Trainer(Training):
    """One process's part of a run of training: a step, and what follows a step."""

    def __init__(
        self,
        run: Run[Any],
        task: Task,
        engine: Engine,
        progress: Progress,
        callbacks: Sequence[Callback],
        until: int | None,
    ) -> None:
        super().__init__(run, task, engine, progress)
        self.config = run.config
        self.last_step = run.config.train.max_steps
        self.stop_step = min(until or self.last_step, self.last_step)
        self.saver = Saver(run, engine, task.data_identity)
        self.stop = StopSignal()
        self.metrics = Metrics(run, task)
        self.callbacks = [self.metrics, *callbacks_of(run.config), *callbacks]
        self.save_is_due = False
        self.stopping = False
        """A process has to stop."""
        self.directory_gone = False
        engine.model.train()

    def call_callbacks(self, method: str, *values: Any) -> None:
        """Call a method of all callbacks."""
        for callback in self.callbacks:
            getattr(callback, method)(self, *values)

    def train_step(self) -> Requests:
        """Make one update: forward and backward of each micro-batch, then clip and apply the gradients.

        The host does not wait for the device. Returns what all processes together ask for.
        """
        engine, progress = self.engine, self.progress
        signals.update_begins()
        self.call_callbacks("on_update_begin")
        if depends_on_skipped(self.config, progress.step - progress.skipped_steps - self.outcomes.unread):
            self.outcomes.read()
        settings = scheduled(self.config, progress.step, progress.skipped_steps)
        self.lr = settings["lr"]
        engine.begin_update(settings)
        count = self.run.process_batch_size // self.run.micro_batch_size
        loss = torch.zeros((), device=self.run.accelerator.device)
        for number, batch in enumerate(self._micro_batches(count)):
            signals.progress()
            self._seed(number)
            with engine.micro_batch(last=number == count - 1):
                share = self.task.loss(engine.model, batch)
                engine.backward(share)
            loss += share.detach()
        agreed = engine.agreement.ask(self._requests())
        outcome = engine.finish_update(loss)
        progress.step += 1
        progress.position += self.task.batch_size
        self.outcomes.add(outcome)
        return agreed()

    def after_step(self, requests: Requests) -> None:
        """Report the update; evaluate and save where that is due; leave if a process was told to stop."""
        progress = self.progress
        self.stopping, self.directory_gone = requests.stop, requests.directory_gone
        self.save_is_due |= requests.save or requests.save_and_wait or self.saver.is_due(progress.step)
        self.outcome = None
        if self._needs_outcome():
            self.outcome = self.wait_for_outcome()
            if self.outcomes.too_many:
                self._fail_diverged(f"train.max_skipped_steps: {self.outcomes.too_many}")
        self.saver.report()
        if requests.saved:
            self._report_saved_checkpoints()
        if self.directory_gone:
            self.run.recreate_directory()
        self.call_callbacks("on_update_end")
        self.clock.pause()
        # After a stop request the process is killed soon: it saves, and does not evaluate.
        evaluating = self._is_evaluated(progress.step) and not (self.stopping or self.directory_gone)
        improved = self.evaluate() if evaluating else False
        ending = self.stopping or self.directory_gone or progress.step == self.stop_step
        if ending and not self.directory_gone and self.engine.any_process(self.run.directory_is_gone()):
            self.directory_gone = True  # during the evaluation
            self.run.recreate_directory()
        # Skipped updates may mean that the weights have diverged, so a save that is due waits for an applied update.
        # Weights that were just evaluated as the best have not diverged: they are saved at once.
        applied = not self.outcomes.last.skipped
        best = improved and self.config.checkpoint.keep_best
        if ending:
            self._save_and_wait(delete_older=applied)
        elif best or (self.save_is_due and applied):
            self.saver.save(progress, delete_older=applied, must_succeed=requests.save_and_wait)
            self.save_is_due = False
        if self.directory_gone:
            self._fail_without_directory()
        if self.stopping:
            self.leave()
        self.clock.resume()

    def evaluate(self) -> bool:
        """Evaluate the model; return whether it is the best so far. A process that was told to stop ends it early."""
        try:
            figures = _evaluate(self.task, self.engine, self.stop)
        except StoppedWaitingError:
            if self.run.accelerator.num_processes > 1:
                raise
            self.engine.model.train()
            figures = None
        if figures is None:
            self.stopping = True
            return False
        self.progress.evaluated_step = self.progress.step
        improved = self.progress.improves(self.task.score(figures))
        self.call_callbacks("on_evaluation_end", figures)
        return improved

    def evaluation_is_missing(self) -> bool:
        """Return whether the last update is still to be evaluated: a run that is told to stop leaves that undone."""
        step = self.progress.step
        return self.progress.evaluated_step < step <= self.last_step and self._is_evaluated(step)

    def evaluate_resumed_update(self) -> None:
        """Evaluate the update that the run resumed from."""
        self.evaluate()
        if self.stopping:
            self.leave()
        if self.progress.step == self.last_step:  # the checkpoint says that it was evaluated, and which one was best
            self._save_and_wait(delete_older=True)

    def leave(self) -> NoReturn:
        """End this process after a signal, once everything is saved."""
        number = int(self.stop.received or 15)
        # Printed while all processes still run: when the first one exits, the launcher stops the others.
        self.run.say(
            f"stopped by signal {number} after update {self.progress.step}; the same command resumes from here"
        )
        self.end()
        self.engine.close()
        sys.exit(128 + number)

    def end(self) -> None:
        """Tell the callbacks that the run ends, and wait for those of the main process."""
        self.call_callbacks("on_run_end")
        # The launcher stops all processes when the first has left.
        self.run.call_on_main(lambda: None)

    def check_result(self) -> None:
        """End the run with an error if rows of metrics.jsonl are lost, or the last checkpoint is not finite."""
        run, last, rows = self.run, self.step, self.metrics.rows
        if self.engine.any_process(rows.flush() > 0):
            run.fail(
                f"run_dir: {rows.path} could not be written to the end; the checkpoint of update {last} is complete"
            )
        if run.call_on_main(lambda: is_finite(checkpoint_path(run, last))) is False:
            self._fail_diverged(
                f"after the last update, {last}, the run has weights or optimizer states that are not finite"
            )

    def _micro_batches(self, count: int) -> Iterator[Any]:
        """Yield the update's `count` micro-batches.

        Raises ValueError if the task yields another number: gradients are reduced in the last one. If a stop signal
        arrives while this process waits for data, a single process saves and exits; one of several raises an error,
        because the others are in the middle of an update.
        """
        try:
            given = 0
            for given, batch in enumerate(self.clock.timed(self.task.micro_batches(self.progress.position)), 1):
                if given > count:
                    break
                yield batch
        except StoppedWaitingError:
            if self.run.accelerator.num_processes > 1:
                raise
            self.engine.cancel_update()
            self.outcomes.read()
            self._save_and_wait(delete_older=not self.outcomes.last.skipped)
            self.leave()
        if given != count:
            raise ValueError(
                f"{type(self.task).__name__}.micro_batches yielded {'at least ' if given > count else ''}{given} "
                f"micro-batches; expected {count} = train.global_batch_size / processes / train.micro_batch_size"
            )

    def _seed(self, number: int) -> None:
        """Make the random numbers of a micro-batch, as dropout's, a function of the seed and the data's position.

        A resumed run then has the same.
        """
        key = f"{self.config.seed} {self.progress.position} {self.run.accelerator.process_index} {number}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))

    def _requests(self) -> Requests:
        return Requests(
            stop=self.stop.received is not None,
            save=self.saver.is_due_by_the_clock,
            save_and_wait=self.saver.has_to_succeed,
            directory_gone=self.run.directory_is_gone(),
            saved=bool(self.saver.complete),
        )

    def _is_evaluated(self, step: int) -> bool:
        return step == self.last_step or step % self.config.train.eval_every_steps == 0

    def _needs_outcome(self) -> bool:
        """Return whether the host needs the outcome of the update now; the same on all processes."""
        step, ending = self.step, self.stopping or self.directory_gone
        if self.save_is_due or ending or step == self.stop_step or self._is_evaluated(step) or step % _READ_EVERY == 0:
            return True
        return any(callback.needs_outcome(step) for callback in self.callbacks)

    def _fail_diverged(self, what: str) -> NoReturn:
        resume_point = self.saver.describe_resume_point()
        self.run.fail(f"{what}; lower optimizer.lr, or look at the data; {resume_point}", DivergedError)

    def _save_and_wait(self, *, delete_older: bool) -> None:
        self.metrics.say(f"saved {self.saver.save(self.progress, delete_older=delete_older, must_succeed=True)}")
        self._report_saved_checkpoints()

    def _report_saved_checkpoints(self) -> None:
        """Tell the callbacks of the main process; the others wait without a time limit."""

        def report() -> None:
            for path in self.saver.take_complete():
                self.call_callbacks("on_checkpoint_saved", path)

        self.run.call_on_main(report)

    def _fail_without_directory(self) -> NoReturn:
        self.end()
        self.run.fail(
            f"run_dir: {self.run.directory} was renamed or removed during the run. All of the training is in "
            f"{checkpoint_path(self.run, self.progress.step)}, in a new directory of that name; the same command "
            "resumes from there. Older checkpoints and metrics are where the old directory is, if it is"
        )


def _evaluate(task: Task, engine: Engine, stop: StopSignal) -> dict[str, float] | None:
    engine.broadcast_buffers()
    engine.model.eval()
    batches = itertools.count(1)

    def stopping() -> bool:
        signals.progress()
        return next(batches) % _ASK_EVERY == 0 and engine.any_process(stop.received is not None)

    with torch.no_grad():
        figures = task.evaluate(engine.module, stopping)
    engine.model.train()
    return figures
