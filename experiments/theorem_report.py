"""Slopes, figure and table of the theorem's experiment."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

SLOPE = -0.25
RESAMPLES = 2000

Found = Mapping[tuple[str, float], dict[str, Any]]
"""What was measured, by name of the function and p."""


def slope(steps: list[int], averages: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the least-squares slope of log(average) against log(N), N = T^2; averages have shape (..., lengths)."""
    x = np.log(np.square(np.asarray(steps, dtype=np.float64)))
    x -= x.mean()
    # sum_k (x_k - mean x) y_k / sum_k (x_k - mean x)^2
    return np.asarray((np.log(averages) * x).sum(axis=-1) / (x * x).sum())


def slope_with_interval(steps: list[int], noisy: list[list[float]]) -> tuple[float, float, float]:
    """Return the slope of the mean over seeds, and its 95 % interval: percentiles over resampled seeds."""
    values = np.asarray(noisy)  # (lengths, seeds)
    seeds = values.shape[1]
    drawn = np.random.default_rng(0).integers(seeds, size=(RESAMPLES, seeds))
    slopes = slope(steps, values[:, drawn].mean(axis=-1).T)
    low, high = np.percentile(slopes, [2.5, 97.5])
    return float(slope(steps, values.mean(axis=1))), float(low), float(high)


def upper_half(values: dict[str, Any]) -> dict[str, Any]:
    """Return the same, of the longer half of the runs alone."""
    start = len(values["steps"]) // 2
    return {**values, **{name: values[name][start:] for name in ("steps", "noisy", "noise_free", "bound")}}


def table(found: Found) -> str:
    """Return slopes and the distance from the theorem's bound, in Markdown."""
    steps = next(iter(found.values()))["steps"]
    seeds = len(next(iter(found.values()))["noisy"][0])
    late = steps[len(steps) // 2]
    lines = [
        "Slope of the average of ‖∇f‖ (p* norm, to the power p*) against N = T² on logarithmic axes; of the theorem's",
        f"bound: {SLOPE}. {seeds} seeds; in brackets the 95 % interval (bootstrap over seeds). T from {steps[0]:,} to",
        f"{steps[-1]:,}, and its longer half, from {late:,} on. Last, the largest share of the bound that any T",
        "reached (mean over seeds).",
        "",
        f"| function | p | L | G | slope, all T | slope, T ≥ {late:,} | without noise, T ≥ {late:,} | share of bound |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (name, p), values in found.items():
        half = upper_half(values)
        intervals = [slope_with_interval(part["steps"], part["noisy"]) for part in (values, half)]
        whole, longer = (f"{middle:.3f} [{low:.3f}, {high:.3f}]" for middle, low, high in intervals)
        exact = float(slope(half["steps"], np.asarray(half["noise_free"])))
        share = max(np.asarray(values["noisy"]).mean(axis=1) / np.asarray(values["bound"]))
        constants = f"{values['L']:.3g} | {values['G']:.3g}"
        lines.append(f"| {name} | {_p(p)} | {constants} | {whole} | {longer} | {exact:.3f} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def figure(found: Found) -> Figure:
    """Draw a panel for each function and p: measured, without noise, the bound, and the theorem's slope."""
    names, norms = list(dict.fromkeys(name for name, _ in found)), list(dict.fromkeys(p for _, p in found))
    drawn = Figure(figsize=(14, 6.6), layout="constrained")
    panels = drawn.subplots(len(names), len(norms), sharex=True, sharey="row", squeeze=False)
    for (name, p), values in found.items():
        axes = panels[names.index(name), norms.index(p)]
        gradients = np.square(np.asarray(values["steps"], dtype=np.float64))
        noisy = np.asarray(values["noisy"])
        mean = noisy.mean(axis=1)
        low, high = np.percentile(noisy, [2.5, 97.5], axis=1)
        axes.plot(gradients, values["bound"], color="0.5", linestyle=":", linewidth=1.5, label="the theorem's bound")
        guide = mean[-1] * (gradients / gradients[-1]) ** SLOPE
        axes.plot(
            gradients, guide, color="black", linestyle="--", linewidth=1, label="slope −1/4 through the last point"
        )
        axes.fill_between(gradients, low, high, color="#0072B2", alpha=0.25, linewidth=0, label="95 % of seeds")
        axes.plot(gradients, mean, color="#0072B2", marker="o", markersize=3.5, label="mean over seeds")
        axes.plot(gradients, values["noise_free"], "x", color="#CC3311", markersize=4, label="without noise")
        half = upper_half(values)
        middle, *_ = slope_with_interval(half["steps"], half["noisy"])
        shown = f"slope {middle:.3f}\nfor T ≥ {half['steps'][0]:,}"
        axes.text(0.96, 0.94, shown, transform=axes.transAxes, fontsize=9, ha="right", va="top")
        axes.set(xscale="log", yscale="log", title=f"{name}, p = {_p(p)}")
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set(xlabel="gradients taken, N = T²")
    for axes in panels[:, 0]:
        axes.set(ylabel=r"average of $\|\nabla f(\theta_t)\|_{p^*}^{p^*}$")
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    seeds = len(next(iter(found.values()))["noisy"][0])
    drawn.suptitle(f"Algorithm 1 with the theorem's batch size and step size, {seeds} seeds", fontsize=11)
    return drawn


def _p(p: float) -> str:
    return "∞" if p == math.inf else f"{p:g}"
