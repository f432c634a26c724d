"""What a run reports: the progress line, metrics.jsonl, loss.png, the trackers."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from stacey_dist.training.devices import memory_in_use
from stacey_dist.training.flops import peak_flops
from stacey_dist.training.loss_plot import draw_losses
from stacey_dist.training.outcomes import Outcome
from stacey_dist.training.progress_line import ProgressLine
from stacey_dist.training.rows import RowFile
from stacey_dist.training.run import Run
from stacey_dist.training.saving import Progress
from stacey_dist.training.trackers import start_trackers

T = TypeVar("T")

_SHOW_EVERY_SECONDS = 1.0  # on a terminal, between lines that are due: the host waits for the device to know the loss


class Metrics:
    """Writes a run's figures. Only the main process writes; every process may call.

    Args:
        run: the run.
        unit: what is counted per second, as in "tokens".
        flops_per_unit: floating-point operations of training on one unit, for the share of peak speed (MFU).
        progress: where the run starts or resumes; later rows of metrics.jsonl, left by a run that was killed after
            its last checkpoint, are dropped.
    """

    def __init__(self, run: Run[Any], unit: str, flops_per_unit: float, progress: Progress) -> None:
        self.run, self.unit, self.flops_per_unit = run, unit, flops_per_unit
        self.main = run.accelerator.is_main_process
        self.max_steps = run.config.train.max_steps
        self.start_step = progress.step
        device = run.accelerator.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = peak * run.accelerator.num_processes if peak else None
        self.line = ProgressLine(unit, self.max_steps)
        self.rows = RowFile(run.directory / "metrics.jsonl", self.say)
        self._units = 0
        self._waited = 0.0
        self._busy = 0.0
        self._since = time.perf_counter()
        self._total_busy = 0.0
        self._drawn = self._shown = self._since
        if self.main:
            self.rows.drop_later(progress.step, progress.evaluated_step)
        start_trackers(run)

    def pause_clock(self) -> None:
        """Stop the clock: what follows (evaluation, saving) does not count as training."""
        self._busy += time.perf_counter() - self._since

    def resume_clock(self) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches; the time that the process waits for them is counted."""
        batches = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def is_due(self, step: int) -> bool:
        """Return whether update `step` is one that is written: the same on every process."""
        return step % self.run.config.train.log_every_steps == 0 or step in (self.start_step + 1, self.max_steps)

    def is_to_be_shown(self) -> bool:
        """Return whether this process has not written its line on a terminal for a second."""
        return self.main and self.line.live and time.perf_counter() - self._shown > _SHOW_EVERY_SECONDS

    def count(self, units: int) -> None:
        """Count the units of a finished update."""
        self._units += units

    def step(self, progress: Progress, outcome: Outcome, *, epochs: dict[str, float], lr: float) -> None:
        """Print the last update, and write it where it is due."""
        step = progress.step
        due = self.is_due(step)
        now = self._shown = time.perf_counter()
        busy = self._busy + now - self._since
        row = {"step": step, **epochs, "loss": outcome.loss, "lr": lr, "grad_norm": outcome.grad_norm}
        row |= self._usage(busy) | {"skipped_steps": progress.skipped_steps}
        if self.main:
            seconds_a_step = (self._total_busy + busy) / (step - self.start_step)
            self.line.print(row, seconds_a_step * (self.max_steps - step), keep=due)
        if due:
            self.write(row)
            self._total_busy += busy
            self._units, self._waited, self._busy, self._since = 0, 0.0, 0.0, now

    def _usage(self, seconds: float) -> dict[str, float]:
        """Return the columns for speed, waiting and memory of what was done in so many seconds."""
        speed = self._units / seconds
        usage = {f"{self.unit}_per_second": round(speed, 1)}
        if self.peak is not None:
            usage["mfu"] = round(speed * self.flops_per_unit / self.peak, 4)
        usage["data_wait"] = round(min(self._waited / seconds, 1.0), 4)
        usage["memory_gb"] = round(memory_in_use(self.run.accelerator.device) / 2**30, 3)
        return usage

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Write and print the figures of an evaluation after update `step`."""
        self.write({"step": step, **figures})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.say(f"step {step}/{self.max_steps}  {shown}")

    def plot(self, always: bool) -> None:
        """Draw the losses, and the accuracy if there is one, over the updates into run_dir/loss.png.

        Every 20 seconds at most unless `always`: training waits for it, on a slow machine for a second.
        """
        if not self.main or not (always or time.perf_counter() - self._drawn > 20):
            return
        self._drawn = time.perf_counter()
        try:
            draw_losses(self.rows.path, self.unit.removesuffix("s"))
        except Exception as error:  # no defect of a drawing is worth a run
            self.say(f"loss.png could not be written, training continues: {error}")

    def say(self, message: str) -> None:
        """Print a line of its own, below a live progress line."""
        self.run.say(self.line.below(message))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and log it to the trackers."""
        if self.main:
            self.rows.append(row)
        if self.run.accelerator.trackers:
            figures = {name: value for name, value in row.items() if name != "step"}
            self.run.accelerator.log(figures, step=row["step"])
