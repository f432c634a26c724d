"""The figures of a comparison of optimizers."""

import math
import statistics
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray

from experiments.comparison_report import LOOKS, LOWER_IS_BETTER, NAMES, ByP, Found, Searched


def curves(found: Found, metric: str, *, over_time: bool = False) -> Figure:
    """Draw the held-out figure over the updates, or over minutes: mean over seeds, and the range of the seeds."""
    drawn = Figure(figsize=(9, 5.6), layout="constrained")
    axes = drawn.subplots()
    ends = []
    for name in dict.fromkeys(name for name, _ in found):
        own = [run for (other, _), run in found.items() if other == name]
        runs = [run.evaluations for run in own if not run.diverged]
        if not runs:
            continue
        minutes = statistics.fmean(run.seconds_per_update for run in own) / 60
        steps = [row["step"] * (minutes if over_time else 1) for row in runs[0]]
        heights = np.array([_heights(run, metric) for run in runs])
        label, color, linestyle = LOOKS[name]
        axes.plot(steps, heights.mean(axis=0), label=label, linewidth=1.8, color=color, linestyle=linestyle)
        axes.fill_between(steps, heights.min(axis=0), heights.max(axis=0), color=color, alpha=0.15, linewidth=0)
        ends.append(heights.mean(axis=0))
    _look_at_the_ends(axes, ends, metric)
    axes.set(xlabel="minutes of training" if over_time else "update", ylabel=NAMES[metric])
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def _heights(evaluations: list[dict[str, Any]], metric: str) -> NDArray[np.float64]:
    return np.array([np.nan if row[metric] is None else row[metric] for row in evaluations])


def _look_at_the_ends(axes: Axes, curves: list[NDArray[np.float64]], metric: str) -> None:
    """Leave out what a loss shows above: the first quarter, and what is worse than most begin with."""
    curves = [curve for curve in curves if np.isfinite(curve[len(curve) // 4 :]).any()]
    if curves and metric in LOWER_IS_BETTER:
        low = min(float(np.nanmin(curve)) for curve in curves)
        high = max(float(np.nanmax(curve[len(curve) // 4 :])) for curve in curves)
        high = max(min(high, float(np.nanmedian([curve[0] for curve in curves]))), low + 1e-6)
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))


def search(searched: Searched, metric: str) -> Figure:
    """Draw every tuning run by its learning rate: how good each optimizer was, and how much of its range was good."""
    drawn = Figure(figsize=(9, 5.6), layout="constrained")
    axes = drawn.subplots()
    shown = []
    for name, trials in searched.items():
        for state, marker, alpha in (("complete", "o", 0.9), ("pruned", "x", 0.6)):
            kept = [trial for trial in trials if trial["state"] == state and trial["value"] is not None]
            lrs = [trial["settings"].get("optimizer.lr", math.nan) for trial in kept]
            values = [trial["value"] for trial in kept]
            shown += values if state == "complete" else []
            label = LOOKS[name].label if state == "complete" else None
            axes.plot(lrs, values, marker, color=LOOKS[name].color, alpha=alpha, label=label)
    if shown:
        margin = 0.1 * (max(shown) - min(shown) or 1.0)
        axes.set_ylim(min(shown) - margin, max(shown) + margin)
    axes.set(xscale="log", xlabel="learning rate", ylabel=NAMES[metric])
    axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.grid(alpha=0.3)
    axes.legend(title="o complete, x ended early")
    return drawn


def curves_by_p(by_p: ByP, metric: str) -> Figure:
    """Draw the held-out figure over the updates for every p, a panel for each optimizer."""
    names = list(dict.fromkeys(name for name, _ in by_p))
    drawn = Figure(figsize=(5.5 * len(names), 4.6), layout="constrained")
    heights = []
    for axes, name in zip(drawn.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        norms = sorted(p for other, p in by_p if other == name)
        for p, shade in zip(norms, np.linspace(0.1, 0.9, len(norms)), strict=True):
            rows = by_p[name, p].evaluations
            heights.append(_heights(rows, metric))
            color = colormaps["viridis"](shade)
            axes.plot([row["step"] for row in rows], heights[-1], color=color, label=f"p = {p:g}")
        axes.set(title=LOOKS[name].label, xlabel="update")
        axes.grid(alpha=0.3)
        axes.legend()
    drawn.axes[0].set_ylabel(NAMES[metric])
    _look_at_the_ends(drawn.axes[0], heights, metric)
    return drawn
