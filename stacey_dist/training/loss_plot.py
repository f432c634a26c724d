"""loss.png: the curves of a run, from its metrics.jsonl."""

from pathlib import Path
from typing import Any

from stacey_dist.training.rows import read_rows


def draw_losses(metrics: Path, unit: str) -> None:
    """Draw the losses, and the accuracy if there is one, over the updates into loss.png beside `metrics`.

    `unit` is what a loss is the mean over, as in "token". Raises OSError where the file cannot be written.
    """
    from matplotlib.figure import Figure  # the main process alone draws

    rows = read_rows(metrics)
    accuracy = [(row["step"], 100 * row["eval_top1"]) for row in rows if row.get("eval_top1") is not None]
    figure = Figure(figsize=(8, 7.5 if accuracy else 4.5), layout="constrained")
    panels = figure.subplots(2 if accuracy else 1, sharex=True, squeeze=False)[:, 0]
    axes = panels[0]
    train = [(row["step"], row["loss"]) for row in rows if row.get("loss") is not None]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if row.get("eval_loss") is not None]
    if train:
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1.2, label="training loss")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", label="held-out loss")
        _annotate_last(axes, held_out, "{:.3f}")
    axes.set(ylabel=f"cross-entropy, nats per {unit}", title=metrics.parent.name)
    if accuracy:
        panels[1].plot(*zip(*accuracy, strict=True), color="tab:orange", marker="o")
        _annotate_last(panels[1], accuracy, "{:.2f} %")
        panels[1].set(ylabel="held-out top-1 accuracy, %")
    panels[-1].set(xlabel="update")
    for panel in panels:
        panel.margins(y=0.1)
        panel.grid(alpha=0.3)
    if train or held_out:
        axes.legend()
    figure.savefig(metrics.with_name("loss.png"), dpi=120)


def _annotate_last(axes: Any, points: list[tuple[int, float]], form: str) -> None:
    text = form.format(points[-1][1])
    axes.annotate(text, points[-1], xytext=(0, -8), textcoords="offset points", ha="center", va="top")
