"""What a run reports: the progress line, metrics.jsonl, loss.png, the trackers, the share of peak speed."""

import json
import math
import os
import re
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from stacey_dist.errors import SettingsError
from stacey_dist.training.command_line import flatten, to_dict
from stacey_dist.training.loss_plot import draw_losses
from stacey_dist.training.rows import read_lines
from stacey_dist.training.run import Run
from stacey_dist.training.saving import Progress

T = TypeVar("T")

# Dense bf16 tensor throughput in FLOP/s, as the makers state it (without sparsity).
_PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "H800": 989e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A40": 150e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak bf16 (fp16 on older GPUs) FLOP/s of a GPU by its name, None where it is not known."""
    for name in sorted(_PEAK_FLOPS, key=len, reverse=True):
        if re.search(rf"\b{name}\b", device_name):
            return _PEAK_FLOPS[name]
    return None


def flops_per_token(weights: int, layers: int, hidden_size: int, context: int) -> float:
    """Floating-point operations of a transformer's forward and backward pass on one token, as the MFU counts them.

    6 for each of `weights`, which leave out an input embedding that is only a look-up; and attention, 12 * layers *
    width * context: scores and weighted sums, not halved for the causal mask.
    """
    return 6.0 * weights + 12.0 * layers * hidden_size * context


class Metrics:
    """Writes a run's figures. Only the main process writes; every process may call.

    Args:
        run: the run.
        unit: what is counted per second, as in "tokens".
        flops_per_unit: floating-point operations of training on one unit, for the share of peak speed (MFU).
        progress: where the run starts or resumes; later rows of metrics.jsonl, left by a run that was killed after
            its last checkpoint, are dropped.
    """

    def __init__(self, run: Run, unit: str, flops_per_unit: float, progress: Progress) -> None:
        self.run, self.unit, self.flops_per_unit = run, unit, flops_per_unit
        self.main = run.accelerator.is_main_process
        self.path = run.directory / "metrics.jsonl"
        self.max_steps = run.config.train.max_steps
        self.start_step = progress.step
        name = torch.cuda.get_device_name() if run.accelerator.device.type == "cuda" else ""
        peak = peak_flops(name)
        self.peak = peak * run.accelerator.num_processes if peak else None
        self.live = sys.stdout.isatty()
        self._unwritten: list[str] = []
        self._units = 0
        self._waited = 0.0
        self._busy = 0.0
        self._since = time.perf_counter()
        self._total_busy = 0.0
        self._drawn = self._since
        if self.main:
            self._drop_later_rows(progress)
        _init_trackers(run)

    def _drop_later_rows(self, progress: Progress) -> None:
        if self.path.exists() and not self.path.is_file():
            raise SettingsError(f"run_dir: {self.path} is no regular file; move it away")
        lines, bad = read_lines(self.path)
        if bad:
            shown = ", ".join(map(str, bad[:3])) + (", ..." if len(bad) > 3 else "")
            self.say(f"warning: {self.path}: dropped {len(bad)} of its lines, which hold no row: line {shown}")
        # Evaluations write eval_*, and come again if the checkpoint does not know of them.
        kept = [
            line
            for line, row in lines
            if row["step"] <= (progress.evaluated_step if "eval_loss" in row else progress.step)
        ]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))
        os.replace(temporary, self.path)

    def pause_clock(self) -> None:
        """Stop the clock: what follows (evaluation, saving) does not count as training."""
        self._busy += time.perf_counter() - self._since

    def resume_clock(self) -> None:
        """Start the clock again."""
        self._since = time.perf_counter()

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, with the time that the process waits for them counted."""
        batches = iter(batches)
        while True:
            begun = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - begun
            if batch is None:
                return
            yield batch

    def step(self, progress: Progress, units: int, *, epoch: float, loss: float, lr: float, grad_norm: float) -> None:
        """Count a finished update; print and write it where the settings say so."""
        step = progress.step
        self._units += units
        due = step % self.run.config.train.log_every_steps == 0 or step in (
            self.start_step + 1,
            self.max_steps,
        )
        if not (due or self.live):
            return
        now = time.perf_counter()
        busy = self._busy + now - self._since
        speed = self._units / busy
        row: dict[str, Any] = {
            "step": step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            f"{self.unit}_per_second": round(speed, 1),
        }
        if self.peak is not None:
            row["mfu"] = round(speed * self.flops_per_unit / self.peak, 4)
        row["data_wait"] = round(min(self._waited / busy, 1.0), 4)
        row["memory_gb"] = round(memory_in_use(self.run.accelerator.device) / 2**30, 3)
        row["skipped_steps"] = progress.skipped_steps
        done = step - self.start_step
        seconds_left = (self._total_busy + busy) / done * (self.max_steps - step)
        if self.main:
            self._print(row, seconds_left, due)
        if due:
            self.write(row)
            self._total_busy += busy
            self._units, self._waited, self._busy, self._since = 0, 0.0, 0.0, now

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
            draw_losses(self.path, self.unit.removesuffix("s"))
        except Exception as error:  # no defect of a drawing is worth a run
            self.say(f"loss.png could not be written, training continues: {error}")

    def say(self, message: str) -> None:
        """Print a line of its own, below a live progress line."""
        self.run.say(("\n" if self.live else "") + message)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and log it to the trackers."""
        if self.main:
            # JSON has no NaN and no infinity.
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            self._unwritten.append(json.dumps(finite, allow_nan=False) + "\n")
            self.flush()
        figures = {name: value for name, value in row.items() if name != "step"}
        if self.run.accelerator.trackers:
            self.run.accelerator.log(figures, step=row["step"])

    def flush(self) -> int:
        """Write the rows that wait for it: on a full disk they go on waiting. Returns how many still wait."""
        if not self._unwritten:
            return 0
        new = not self.path.exists()
        try:
            end = 0 if new else self.path.stat().st_size
            try:
                with self.path.open("a") as file:
                    file.writelines(self._unwritten)
            except OSError:
                if self.path.exists():
                    os.truncate(self.path, end)  # no row twice, and none by half
                raise
        except OSError as error:
            if len(self._unwritten) == 1:
                self.say(f"{self.path} could not be written, its rows are kept until it can: {error}")
            return len(self._unwritten)
        if new:
            self.say(f"{self.path} was renamed or removed during the run; later rows are in a new one")
        self._unwritten.clear()
        return 0

    def _print(self, row: dict[str, Any], seconds_left: float, due: bool) -> None:
        parts = [
            f"step {row['step']}/{self.max_steps}",
            f"epoch {row['epoch']:.2f}",
            f"loss {row['loss']:.4f}",
            f"lr {row['lr']:.2e}",
            f"grad norm {row['grad_norm']:.3f}",
            f"{row[f'{self.unit}_per_second']:,.0f} {self.unit}/s",
        ]
        if "mfu" in row:
            parts.append(f"mfu {row['mfu']:.1%}")
        parts += [f"data {row['data_wait']:.0%}", f"{row['memory_gb']:.1f} GB", f"ETA {duration(seconds_left)}"]
        if row["skipped_steps"]:
            parts.append(f"{row['skipped_steps']} skipped")
        line = "  ".join(parts)
        if self.live:  # one line that is written again at every step, kept at every due one
            print(f"\r\x1b[K{line}", end="\n" if due else "", flush=True)
        else:
            print(line, flush=True)


def _init_trackers(run: Run) -> None:
    tracking, accelerator = run.config.tracking, run.accelerator
    if not tracking.trackers:
        return
    wandb_settings = {"name": tracking.run_name or run.directory.name, "dir": str(run.directory)}
    if "wandb" in run.tracker_ids:
        wandb_settings |= {"id": run.tracker_ids["wandb"], "resume": "allow"}
    if "wandb" in tracking.trackers and "WANDB_MODE" not in os.environ and not _logged_in_to_wandb():
        wandb_settings["mode"] = "offline"
        run.say("wandb: not logged in, so the run is kept offline; `wandb sync` uploads it")
    settings = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in flatten(to_dict(run.config)).items()
    }
    accelerator.init_trackers(
        tracking.project,
        config=settings,
        init_kwargs={"wandb": wandb_settings},
    )
    if "wandb" in tracking.trackers and accelerator.is_main_process:
        run.tracker_ids = {"wandb": accelerator.get_tracker("wandb", unwrap=True).id}


def _logged_in_to_wandb() -> bool:
    import wandb

    return bool(wandb.login(prompt=False))


def memory_in_use(device: torch.device) -> int:
    """Peak bytes: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m10s or 5h02m."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
