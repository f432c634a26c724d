"""The table and the figures of a comparison of optimizers."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from numpy.typing import NDArray
from scipy.stats import t

LABELS = {
    "sgd": "SGD, Nesterov",
    "adam": "Adam",
    "adamw": "AdamW",
    "lion": "Lion",
    "stacey_p2": "STACEY(p,2)",
    "stacey_pp": "STACEY(p,p)",
    "stacey_pp_growing": "STACEY(p,p), α grows",
    "stacey_2p": "STACEY(2,p)",
    "stacey_p2_tau": "STACEY(p,2), τ with lr",
    "stacey_uncoupled": "STACEY, τ = 0",
    "muon": "Muon",
    "ademamix": "AdEMAMix",
}
# Colours that the colour-blind tell apart, most of them Okabe and Ito's; STACEY's lines are whole.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": dict(color="#999999", linestyle=":"),
    "adam": dict(color="#56B4E9", linestyle="--"),
    "adamw": dict(color="#E69F00", linestyle="--"),
    "lion": dict(color="#CC3311", linestyle="-."),
    "stacey_p2": dict(color="#0072B2", linestyle="-"),
    "stacey_pp": dict(color="#009E73", linestyle="-"),
    "stacey_pp_growing": dict(color="#0072B2", linestyle="-"),
    "stacey_2p": dict(color="#CC79A7", linestyle="-"),
    "stacey_p2_tau": dict(color="#000000", linestyle="-"),
    "stacey_uncoupled": dict(color="#000000", linestyle=":"),
    "muon": dict(color="#8B4513", linestyle="--"),
    "ademamix": dict(color="#F0E442", linestyle="--"),
}
REFERENCE = "adamw"
LOWER_IS_BETTER = ("eval_loss",)
NAMES = {"eval_loss": "held-out loss", "eval_top1": "held-out top-1"}
FORMS = {"eval_loss": "{:.4f}", "eval_top1": "{:.2%}"}

_SCHEDULES = {
    "schedule.alpha": "schedule of alpha",
    "schedule.tau": "schedule of tau",
    "schedule.final_alpha": "alpha at the end",
}

Found = Mapping[tuple[str, int], dict[str, Any]]
"""A `trial.Result`, as a dictionary, by optimizer and seed."""

ByP = Mapping[tuple[str, float], dict[str, Any]]
"""The same, by optimizer and p."""

Searched = Mapping[str, list[dict[str, Any]]]
"""What `Tuner.run` returned, by optimizer."""


@dataclass(frozen=True)
class Report:
    """The figures of a comparison, for JSON and for people."""

    values: dict[str, Any]
    table: str


def mean_with_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean, and half the width of its 95 % confidence interval (Student's t; NaN for one value)."""
    mean, count = statistics.fmean(values), len(values)
    if count < 2:
        return mean, math.nan
    return mean, float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)


def updates_to_reach(evaluations: list[dict[str, Any]], metric: str, target: float) -> float | None:
    """Return the update at which a run first was as good as `target`, between evaluations on a straight line.

    None if it never was; the first evaluation's update if it was so from there on.
    """
    sign = 1.0 if metric in LOWER_IS_BETTER else -1.0
    before: tuple[int, float] | None = None
    for row in evaluations:
        if row[metric] is None:
            return None
        step, above = row["step"], sign * (row[metric] - target)
        if above <= 0:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * before[1] / (before[1] - above)
        before = step, above
    return None


def report(found: Found, metric: str, settings: Mapping[str, dict[str, Any]], searched: Searched, by_p: ByP) -> Report:
    """Report the final figures, how soon each optimizer is as good as the reference in the end, and figures by p."""
    names = list(dict.fromkeys(name for name, _ in found))
    seeds = sorted({seed for _, seed in found})
    standard = REFERENCE if REFERENCE in names else names[0]
    reference = [final(found[standard, seed], metric) for seed in seeds]
    reference_seconds = statistics.fmean(found[standard, seed]["seconds_per_update"] for seed in seeds)
    # Runs that were made with other numbers of --workers had other numbers of threads.
    timed = len({run["threads"] for run in found.values()}) == 1
    values: dict[str, Any] = {}
    for name in names:
        runs = [found[name, seed] for seed in seeds]
        finals = [final(run, metric) for run in runs]
        finite = [value for value in finals if value is not None]
        # Each seed against AdamW with that seed: they have the same batches and initial weights.
        reached = [
            updates_to_reach(run["evaluations"], metric, target) if target is not None and not run["diverged"] else None
            for run, target in zip(runs, reference, strict=True)
        ]
        apart = [
            own - other for own, other in zip(finals, reference, strict=True) if own is not None and other is not None
        ]
        difference, half_of_difference = mean_with_interval(apart) if apart else (None, None)
        pairs = zip(reached, runs, strict=True)
        shares = [update / run["evaluations"][-1]["step"] for update, run in pairs if update is not None]
        mean, half = mean_with_interval(finite) if finite else (None, None)
        cost = statistics.fmean(run["seconds_per_update"] for run in runs) / reference_seconds if timed else None
        values[name] = {
            "finals": finals,
            "mean": mean,
            "interval": _finite(half),
            "difference": difference,
            "interval_of_difference": _finite(half_of_difference),
            "diverged": len(finals) - len(finite),
            "reached": len(shares),
            "share_of_updates": statistics.fmean(shares) if len(shares) == len(runs) else None,
            "time_per_update": cost,
            "state_bytes_per_parameter": statistics.fmean(run["state_bytes_per_parameter"] for run in runs),
            "settings": settings[name],
            "tuning": searched.get(name, []),
        }
    ends = {f"{name} p={p:g}": final(run, metric) for (name, p), run in by_p.items()}
    table = _table(values, metric, len(seeds), LABELS[standard], searched) + _table_by_p(by_p, metric, seeds[0])
    untrained = {name: trials for name, trials in searched.items() if name not in values}
    return Report({"metric": metric, "seeds": seeds, "optimizers": values, "untrained": untrained, "by_p": ends}, table)


def _finite(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else value


def final(run: dict[str, Any], metric: str) -> float | None:
    """Return a held-out figure after the last update, of a `trial.Result` as a dictionary; None if it diverged."""
    return None if run["diverged"] or not run["evaluations"] else run["evaluations"][-1][metric]


def _table(values: Mapping[str, dict[str, Any]], metric: str, seeds: int, standard: str, searched: Searched) -> str:
    sign = 1.0 if metric in LOWER_IS_BETTER else -1.0

    def place(name: str) -> tuple[int, float]:
        """Return the sort key of a row: what diverged with some seed is not judged by the others."""
        row = values[name]
        return row["diverged"], 0.0 if row["mean"] is None else sign * row["mean"]

    form = FORMS[metric]
    lines = [
        f"{NAMES[metric]} after the last update, mean over {seeds} seeds with its 95 % interval (Student's t); the",
        f"same of its differences from {standard} with the same seed, and hence batches and initial weights; the share",
        f"of its updates after which a run is as good as {standard}'s with that seed in the end (– unless all get",
        f"there); the time of an update against {standard}'s; bytes of optimizer state a parameter.",
        "",
        f"| optimizer | {NAMES[metric]} | against {standard} | as {standard} after | time of an update | state "
        "| settings |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in sorted(values, key=place):
        row = values[name]
        mean = "diverged" if row["mean"] is None else _with_interval(form, row["mean"], row["interval"])
        if row["diverged"] and row["mean"] is not None:
            mean += f" ({row['diverged']} of {seeds} diverged)"
        apart = "–"
        if row["difference"] is not None and LABELS[name] != standard:
            apart = _with_interval(form.replace(":", ":+"), row["difference"], row["interval_of_difference"])
        share = "–" if row["share_of_updates"] is None else f"{row['share_of_updates']:.0%}"
        cost = "–" if row["time_per_update"] is None else f"{row['time_per_update']:.2f} x"
        shown = ", ".join(
            f"{setting.split('.')[-1]} {_short(v)}" for setting, v in _optimizer_settings(row["settings"]).items()
        )
        lines.append(
            f"| {LABELS[name]} | {mean} | {apart} | {share} | {cost} | {row['state_bytes_per_parameter']:.1f} B "
            f"| {shown} |"
        )
    if searched:
        counts = [f"{LABELS[name]} {_counts(trials)}" for name, trials in searched.items()]
        lines += ["", f"Tuning, runs completed / ended early / diverged: {'; '.join(counts)}."]
    if untrained := [LABELS[name] for name in searched if name not in values]:
        lines.append(f"Without a completed run, and so left out: {', '.join(untrained)}.")
    return "\n".join(lines) + "\n"


def _table_by_p(by_p: ByP, metric: str, seed: int) -> str:
    if not by_p:
        return ""
    names, norms = list(dict.fromkeys(name for name, _ in by_p)), sorted({p for _, p in by_p})
    lines = [
        "",
        f"With another p, all else as above; {NAMES[metric]}, seed {seed}:",
        "",
        f"| optimizer | {' | '.join(f'p = {p:g}' for p in norms)} |",
        "|---" * (1 + len(norms)) + "|",
    ]
    for name in names:
        ends = ["–" if (name, p) not in by_p else shown(final(by_p[name, p], metric), metric) for p in norms]
        lines.append(f"| {LABELS[name]} | {' | '.join(ends)} |")
    return "\n".join(lines) + "\n"


def _with_interval(form: str, value: float, half: float | None) -> str:
    return form.format(value) + ("" if half is None else f" ± {form.replace('+', '').format(half)}")


def shown(end: float | None, metric: str) -> str:
    """Return the text of a result of `final`."""
    return "diverged" if end is None else FORMS[metric].format(end)


def _optimizer_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that the table shows: the optimizer's, and what of it follows a schedule.

    Its name is not among them, which stands in the first column.
    """
    hidden = ("optimizer.name", "optimizer.variant")
    own = {name: value for name, value in settings.items() if name.startswith("optimizer.") and name not in hidden}
    return own | {words: settings[name] for name, words in _SCHEDULES.items() if name in settings}


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "(" + ", ".join(_short(item) for item in value) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _counts(trials: list[dict[str, Any]]) -> str:
    states = [trial["state"] for trial in trials]
    failed = f" ({states.count('failed')} failed)" if "failed" in states else ""
    return " / ".join(str(states.count(state)) for state in ("complete", "pruned", "diverged")) + failed


def curves(found: Found, metric: str, *, over_time: bool = False) -> Figure:
    """Draw the held-out figure over the updates, or over minutes: mean over seeds, and the range of the seeds."""
    drawn = Figure(figsize=(9, 5.6), layout="constrained")
    axes = drawn.subplots()
    ends = []
    for name in dict.fromkeys(name for name, _ in found):
        runs = [run["evaluations"] for (other, _), run in found.items() if other == name and not run["diverged"]]
        if not runs:
            continue
        minutes = statistics.fmean(run["seconds_per_update"] for (other, _), run in found.items() if other == name) / 60
        steps = [row["step"] * (minutes if over_time else 1) for row in runs[0]]
        heights = np.array([_heights(run, metric) for run in runs])
        style = STYLES[name]
        axes.plot(steps, heights.mean(axis=0), label=LABELS[name], linewidth=1.8, **style)
        axes.fill_between(
            steps, heights.min(axis=0), heights.max(axis=0), color=style["color"], alpha=0.15, linewidth=0
        )
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
            label = LABELS[name] if state == "complete" else None
            axes.plot(lrs, values, marker, color=STYLES[name]["color"], alpha=alpha, label=label)
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
            rows = by_p[name, p]["evaluations"]
            heights.append(_heights(rows, metric))
            color = colormaps["viridis"](shade)
            axes.plot([row["step"] for row in rows], heights[-1], color=color, label=f"p = {p:g}")
        axes.set(title=LABELS[name], xlabel="update")
        axes.grid(alpha=0.3)
        axes.legend()
    drawn.axes[0].set_ylabel(NAMES[metric])
    _look_at_the_ends(drawn.axes[0], heights, metric)
    return drawn
