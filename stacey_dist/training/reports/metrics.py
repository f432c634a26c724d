"""Reports of a run: the progress line, metrics.jsonl, the trackers."""

import sys
import time
from typing import Any

import torch

from stacey_dist.training.callbacks import Callback, Training
from stacey_dist.training.processes.devices import memory_in_use
from stacey_dist.training.reports.flops import peak_flops
from stacey_dist.training.reports.rows import RowFile
from stacey_dist.training.reports.trackers import log, start_trackers
from stacey_dist.training.run import Run, print_line
from stacey_dist.training.task import Task

_SHOW_EVERY_SECONDS = 1.0  # on a terminal, between lines that are due: the host waits for the device to know the loss


class Metrics(Callback):
    """Writes a run's figures. Only the main process writes."""

    def __init__(self, run: Run[Any], task: Task) -> None:
        self.run, self.unit, self.flops_per_unit = run, task.unit, task.flops_per_unit
        self.main = run.accelerator.is_main_process
        self.max_steps = run.config.train.max_steps
        device = run.accelerator.device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = peak * run.accelerator.num_processes if peak and self.flops_per_unit else None
        self.live = sys.stdout.isatty()
        """On a terminal, the next line takes the place of one that is not due."""
        self.rows = RowFile(run.directory / "metrics.jsonl", self.say)
        self.start_step = 0
        self._units = 0
        self._waited = 0.0
        self._seconds = 0.0
        self._shown = time.perf_counter()

    def on_run_begin(self, training: Training) -> None:
        """Drop rows that a run has left which was killed after its last checkpoint, and start the trackers."""
        self.start_step = training.step
        if self.main:
            self.rows.drop_later(training.step, training.progress.evaluated_step)
        start_trackers(self.run, training.step)

    def needs_outcome(self, step: int) -> bool:
        """Return whether update `step` is one that is written."""
        return step % self.run.config.train.log_every_steps == 0 or step in (self.start_step + 1, self.max_steps)

    def on_update_end(self, training: Training) -> None:
        """Print the update and write it where it is due; on a terminal, print it every second."""
        position, task = training.progress.position, training.task
        self._units += task.units(position - task.batch_size)
        step, due = training.step, self.needs_outcome(training.step)
        if not due and not self._is_to_be_shown():
            return
        outcome, self._shown = training.wait_for_outcome(), time.perf_counter()
        epoch, seconds = position / task.samples_per_epoch, training.clock.seconds
        row = {
            "step": step,
            "epoch": round(epoch, 4),
            **task.epochs(position),
            self.unit: task.units_before(position),
            "loss": outcome.loss,
            "lr": training.lr,
            "grad_norm": outcome.grad_norm,
            "seconds": round(seconds - self._seconds, 3),
            **self._usage(seconds - self._seconds, training.clock.waited - self._waited),
            "skipped_steps": training.progress.skipped_steps,
        }
        if self.main:
            seconds_left = seconds / (step - self.start_step) * (self.max_steps - step)
            line = progress_line(row, self.unit, self.max_steps, seconds_left)
            print_line(f"\r\x1b[K{line}" if self.live else line, end="\n" if due else "")
        if due:
            self.write(row)
            self._units, self._waited, self._seconds = 0, training.clock.waited, seconds

    def _is_to_be_shown(self) -> bool:
        """Return whether this process has not written its line on a terminal for a second."""
        return self.main and self.live and time.perf_counter() - self._shown > _SHOW_EVERY_SECONDS

    def _usage(self, seconds: float, waited: float) -> dict[str, float]:
        """Return the columns for speed, waiting and memory of what was done in so many seconds."""
        speed = self._units / seconds
        usage = {f"{self.unit}_per_second": round(speed, 1)}
        if self.peak is not None:
            usage["mfu"] = round(speed * self.flops_per_unit / self.peak, 4)
        usage["data_wait"] = round(min(waited / seconds, 1.0), 4)
        usage["memory_gb"] = round(memory_in_use(self.run.accelerator.device) / 2**30, 3)
        return usage

    def on_evaluation_end(self, training: Training, figures: dict[str, float]) -> None:
        """Write and print the figures, and the passes over each part of the data."""
        figures = figures | training.task.epochs(training.progress.position)
        self.write({"step": training.step, **figures})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self.say(f"step {training.step}/{self.max_steps}  {shown}")

    def on_run_end(self, training: Training) -> None:
        """Write the rows that wait."""
        self.rows.flush()

    def say(self, message: str) -> None:
        """Print a line of its own, below a live progress line."""
        self.run.say(("\n" if self.live else "") + message)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and log it to the trackers."""
        if self.main:
            self.rows.append(row)
        log(self.run, row)


def progress_line(row: dict[str, Any], unit: str, max_steps: int, seconds_left: float) -> str:
    """Return a row of metrics.jsonl as a line; `unit` is what it counts, as in "tokens"."""
    parts = [
        f"step {row['step']}/{max_steps}",
        f"epoch {row['epoch']:.2f}",
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.2e}",
        f"grad norm {row['grad_norm']:.3f}",
        f"{row[f'{unit}_per_second']:,.0f} {unit}/s",
    ]
    if "mfu" in row:
        parts.append(f"mfu {row['mfu']:.1%}")
    parts += [f"data {row['data_wait']:.0%}", f"{row['memory_gb']:.1f} GB", f"ETA {duration(seconds_left)}"]
    if row["skipped_steps"]:
        parts.append(f"{row['skipped_steps']} skipped")
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """Return seconds as 42s, 3m10s or 5h02m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
