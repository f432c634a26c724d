"""Plot the curves of a run from its metrics.jsonl to loss.png."""

import time
from collections.abc import Callable
from typing import Any

from stacey_dist.training.callbacks import Callback, Training
from stacey_dist.training.reports.rows import read_rows

_AT_MOST_EVERY_SECONDS = 20.0  # training waits for it, on a slow machine for a second


class Plot(Callback):
    """Has `draw` write the picture `name` of the run after evaluations, and at the end of the run."""

    def __init__(self, name: str, draw: Callable[[Training], None]) -> None:
        self.name, self.draw = name, draw
        self._drawn = time.perf_counter()

    def on_evaluation_end(self, training: Training, figures: dict[str, float]) -> None:
        """Draw, unless the last drawing is less than 20 seconds old."""
        if time.perf_counter() - self._drawn > _AT_MOST_EVERY_SECONDS:
            self.on_run_end(training)

    def on_run_end(self, training: Training) -> None:
        """Draw."""
        if not training.run.accelerator.is_main_process:
            return
        self._drawn = time.perf_counter()
        try:
            self.draw(training)
        except Exception as error:  # no defect of a drawing is worth a run
            training.run.say(f"{self.name} could not be written, training continues: {error}")


def column(rows: list[dict[str, Any]], name: str) -> list[tuple[int, float]]:
    """Return the updates and values of a column, where it has one."""
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def smoothed(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return an exponential moving average of a curve, with a time constant of 2 % of its points.

    The bias toward 0 at the start is corrected, as in Adam.
    """
    decay = max(0.0, 1 - 50 / max(1, len(points)))
    total = weight = 0.0
    found = []
    for step, value in points:
        total, weight = decay * total + value, decay * weight + 1
        found.append((step, total / weight))
    return found


def draw_losses(training: Training) -> None:
    """Draw loss, accuracy if there is one, learning rate and gradient norm over the updates into loss.png.

    Raises OSError where the file cannot be written.
    """
    from matplotlib.figure import Figure  # the main process alone draws

    directory, task = training.run.directory, training.task
    units_per_update = task.units(0)
    rows = read_rows(directory / "metrics.jsonl")
    train, held_out = column(rows, "loss"), column(rows, "eval_loss")
    accuracy = [(step, 100 * share) for step, share in column(rows, "eval_top1")]
    heights = [3.0, *([2.0] if accuracy else []), 1.0, 1.0]
    height = 1.3 + 1.25 * sum(heights)
    figure = Figure(figsize=(8, height))
    # Constrained layout takes as long as all the drawing.
    figure.subplots_adjust(left=0.15, right=0.97, bottom=0.55 / height, top=1 - 0.85 / height, hspace=0.12)
    panels = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    losses, (lr, norm) = panels[0], panels[-2:]
    if train:
        losses.plot(*zip(*train, strict=True), color="tab:blue", linewidth=0.8, alpha=0.35)
        losses.plot(*zip(*smoothed(train), strict=True), color="tab:blue", linewidth=1.6, label="training, smoothed")
    if held_out:
        losses.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held-out")
        _annotate_last(losses, held_out, "{:.3f}")
    if train or held_out:
        losses.legend()
    losses.set(ylabel=getattr(task, "loss_label", "loss"), title=directory.name)
    above = losses.secondary_xaxis("top", functions=(lambda x: x * units_per_update, lambda x: x / units_per_update))
    above.set(xlabel=task.unit)
    if accuracy:
        panels[1].plot(*zip(*accuracy, strict=True), color="tab:orange", marker="o", markersize=4)
        _annotate_last(panels[1], accuracy, "{:.2f} %")
        panels[1].set(ylabel="held-out top-1\naccuracy, %")
    for axes, name, label in ((lr, "lr", "learning\nrate"), (norm, "grad_norm", "gradient\nnorm")):
        if points := column(rows, name):
            axes.plot(*zip(*points, strict=True), color="tab:gray", linewidth=1)
        axes.set(ylabel=label)
    norm.set(yscale="log", xlabel="update")
    for axes in panels:
        axes.yaxis.set_label_coords(-0.115, 0.5)
        axes.margins(y=0.1)
        axes.grid(alpha=0.3)
    figure.savefig(directory / "loss.png", dpi=120)


def _annotate_last(axes: Any, points: list[tuple[int, float]], form: str) -> None:
    text = form.format(points[-1][1])
    axes.annotate(text, points[-1], xytext=(0, -8), textcoords="offset points", ha="center", va="top")
