"""The figures of a comparison of optimizers, as numbers and as tables."""

import math
import statistics
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from scipy.stats import t

from experiments.trial import Result


class Look(NamedTuple):
    """How an optimizer is shown: its name in tables, and its line in figures."""

    label: str
    color: str
    linestyle: str


# Colours that the colour-blind tell apart, most of them Okabe and Ito's; STACEY's lines are whole.
LOOKS = {
    "sgd": Look("SGD, Nesterov", "#999999", ":"),
    "adam": Look("Adam", "#56B4E9", "--"),
    "adamw": Look("AdamW", "#E69F00", "--"),
    "lion": Look("Lion", "#CC3311", "-."),
    "stacey_p2": Look("STACEY(p,2)", "#0072B2", "-"),
    "stacey_pp": Look("STACEY(p,p)", "#009E73", "-"),
    "stacey_pp_growing": Look("STACEY(p,p), α grows", "#0072B2", "-"),
    "stacey_2p": Look("STACEY(2,p)", "#CC79A7", "-"),
    "stacey_p2_tau": Look("STACEY(p,2), τ with lr", "#000000", "-"),
    "stacey_p2_scheduled": Look("STACEY(p,2), α and τ with lr", "#000000", "-"),
    "stacey_uncoupled": Look("STACEY, τ = 0", "#000000", ":"),
    "muon": Look("Muon", "#8B4513", "--"),
    "ademamix": Look("AdEMAMix", "#F0E442", "--"),
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

Found = Mapping[tuple[str, int], Result]
"""Training runs, by optimizer and seed."""

ByP = Mapping[tuple[str, float], Result]
"""Training runs, by optimizer and p."""

Searched = Mapping[str, list[dict[str, Any]]]
"""What `Tuner.run` returned, by optimizer."""


def mean_with_interval(values: list[float]) -> tuple[float | None, float | None]:
    """Return the mean, and half the width of its 95 % confidence interval (Student's t); None where there is none."""
    count = len(values)
    mean = statistics.fmean(values) if values else None
    if count < 2:
        return mean, None
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


def report(
    found: Found,
    metric: str,
    settings: Mapping[str, dict[str, Any]],
    searched: Searched = MappingProxyType({}),
    by_p: ByP = MappingProxyType({}),
) -> tuple[dict[str, Any], str]:
    """Return the final figures, how soon each optimizer is as good as the reference in the end, and figures by p.

    They are returned as JSON holds them, and as a table.
    """
    names = list(dict.fromkeys(name for name, _ in found))
    seeds = sorted({seed for _, seed in found})
    standard = REFERENCE if REFERENCE in names else names[0]
    reference = [found[standard, seed].final(metric) for seed in seeds]
    reference_seconds = statistics.fmean(found[standard, seed].seconds_per_update for seed in seeds)
    # Runs that were made with other numbers of --workers had other numbers of threads.
    timed = len({run.threads for run in found.values()}) == 1
    values: dict[str, Any] = {}
    for name in names:
        runs = [found[name, seed] for seed in seeds]
        finals = [run.final(metric) for run in runs]
        finite = [value for value in finals if value is not None]
        # Each seed against AdamW with that seed: they have the same batches and initial weights.
        reached = [
            updates_to_reach(run.evaluations, metric, target) if target is not None and not run.diverged else None
            for run, target in zip(runs, reference, strict=True)
        ]
        apart = [
            own - other for own, other in zip(finals, reference, strict=True) if own is not None and other is not None
        ]
        difference, half_of_difference = mean_with_interval(apart)
        pairs = zip(reached, runs, strict=True)
        shares = [update / run.evaluations[-1]["step"] for update, run in pairs if update is not None]
        mean, half = mean_with_interval(finite)
        cost = statistics.fmean(run.seconds_per_update for run in runs) / reference_seconds if timed else None
        values[name] = {
            "finals": finals,
            "mean": mean,
            "interval": half,
            "difference": difference,
            "interval_of_difference": half_of_difference,
            "diverged": len(finals) - len(finite),
            "reached": len(shares),
            "share_of_updates": statistics.fmean(shares) if len(shares) == len(runs) else None,
            "time_per_update": cost,
            "state_bytes_per_parameter": statistics.fmean(run.state_bytes_per_parameter for run in runs),
            "settings": settings[name],
            "tuning": searched.get(name, []),
        }
    ends = {f"{name} p={p:g}": run.final(metric) for (name, p), run in by_p.items()}
    table = _table(values, metric, len(seeds), LOOKS[standard].label, searched) + _table_by_p(by_p, metric, seeds[0])
    untrained = {name: trials for name, trials in searched.items() if name not in values}
    return {"metric": metric, "seeds": seeds, "optimizers": values, "untrained": untrained, "by_p": ends}, table


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
        if row["difference"] is not None and LOOKS[name].label != standard:
            apart = _with_interval(form.replace(":", ":+"), row["difference"], row["interval_of_difference"])
        share = "–" if row["share_of_updates"] is None else f"{row['share_of_updates']:.0%}"
        cost = "–" if row["time_per_update"] is None else f"{row['time_per_update']:.2f} x"
        shown = ", ".join(
            f"{setting.split('.')[-1]} {_short(v)}" for setting, v in _optimizer_settings(row["settings"]).items()
        )
        lines.append(
            f"| {LOOKS[name].label} | {mean} | {apart} | {share} | {cost} | {row['state_bytes_per_parameter']:.1f} B "
            f"| {shown} |"
        )
    if searched:
        counts = [f"{LOOKS[name].label} {_counts(trials)}" for name, trials in searched.items()]
        lines += ["", f"Tuning, runs completed / ended early / diverged: {'; '.join(counts)}."]
    if untrained := [LOOKS[name].label for name in searched if name not in values]:
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
        ends = ["–" if (name, p) not in by_p else shown(by_p[name, p].final(metric), metric) for p in norms]
        lines.append(f"| {LOOKS[name].label} | {' | '.join(ends)} |")
    return "\n".join(lines) + "\n"


def _with_interval(form: str, value: float, half: float | None) -> str:
    return form.format(value) + ("" if half is None else f" ± {form.replace('+', '').format(half)}")


def shown(end: float | None, metric: str) -> str:
    """Return the text of a run's final figure."""
    return "diverged" if end is None else FORMS[metric].format(end)


def table_of_losses(title: str, ends: Mapping[str, float | None], metric: str) -> str:
    """Return a table of the held-out figures of single runs, by their names, to stand below another table."""
    rows = [f"| {name} | {shown(end, metric)} |" for name, end in ends.items()]
    return "\n".join(["", f"| {title} | {NAMES[metric]} |", "|---|---|", *rows, ""])


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
