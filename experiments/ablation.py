"""Measure what each setting of STACEY is worth on the small LLaMA of the sweeps.

One at a time, or two that belong together, is changed from the defaults of train_llm.py's optimizer and schedule.
"""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from experiments.comparison import results, training
from experiments.framework import Experiment, Outcome, Reproduction, Scale, configs
from experiments.llm import LARGE, TASK
from experiments.trial import data_settings

BASE = "as it is"
CHANGES: dict[str, dict[str, Any]] = {
    BASE: {},
    **{f"τ = {tau:g}": {"optimizer.tau": tau} for tau in (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1)},
    **{f"α = {alpha:g}": {"optimizer.alpha": alpha} for alpha in (0.01, 0.1, 0.3, 3.0)},
    **{f"p = {p:g}": {"optimizer.p": p} for p in (2.8, 6.0, 10.0, 1000.0, math.inf)},
    **{f"ε = {eps:g}": {"optimizer.eps": eps} for eps in (1e-6, 1e-4)},
    "z begins at 0": {"optimizer.z_init": "zeros"},
    "states in float32": {"optimizer.state_dtype": "float32"},
    "states in bfloat16, rounded to nearest": {"optimizer.rounding": "nearest"},
    **{f"β = ({b1}, {b2})": {"optimizer.betas": [b1, b2]} for b1, b2 in ((0.8, 0.9), (0.9, 0.95), (0.9, 0.99))},
    "β = (0.8, 0.9), lr = 0.0004": {"optimizer.betas": [0.8, 0.9], "optimizer.lr": 0.0004},
    "β = (0.9, 0.95), lr = 0.0002": {"optimizer.betas": [0.9, 0.95], "optimizer.lr": 0.0002},
    "lr = 0.0008": {"optimizer.lr": 0.0008},
    "lr = 0.0018": {"optimizer.lr": 0.0018},
    "τ follows lr": {"schedule.tau": "lr"},
    "α follows lr": {"schedule.alpha": "lr"},
    "τ and α follow lr": {"schedule.tau": "lr", "schedule.alpha": "lr"},
    "m corrected for its bias": {"optimizer.bias_correction": True},
    "p falls to 3": {"schedule.final_p": 3.0},
    "p from 3 up": {"optimizer.p": 3.0, "schedule.final_p": 30.0},
}

Found = Mapping[str, list[float | None]]
"""The final held-out losses of all seeds, by change; None where a run diverged."""


def run(reproduction: Reproduction) -> Outcome:
    """Run every change with every seed."""
    size = reproduction.scale.settings
    given = data_settings(TASK.program, reproduction.directory, reproduction.data, size["without_data"])
    own = {**size["overrides"], **given}
    changes = {label: CHANGES[label] for label in size["changes"]}
    parts = {
        (label, seed): training(
            reproduction,
            TASK.program,
            configs() / "sweeps" / "llm" / "base.yaml",
            {**own, **change, "seed": seed},
            f"{_slug(change)}-seed{seed}",
        )
        for label, change in changes.items()
        for seed in range(reproduction.seeds)
    }
    (runs,) = results(reproduction, parts)
    seeds = range(reproduction.seeds)
    found = {label: [runs[label, seed].final(TASK.metric) for seed in seeds] for label in changes}
    return Outcome({"losses": found}, table(found), {"ablation": figure(found)})


def _slug(change: dict[str, Any]) -> str:
    """Return a file's name for a change."""
    return "-".join(f"{name.split('.')[1]}_{value}" for name, value in change.items()) or "base"


def differences(found: Found, label: str) -> list[float]:
    """Return the differences of a change from none, seed by seed: they have the same batches and initial weights."""
    pairs = zip(found[label], found[BASE], strict=True)
    return [value - base for value, base in pairs if value is not None and base is not None]


def table(found: Found) -> str:
    """Return the change's loss and its difference, mean over seeds, with the least and the greatest."""
    seeds = len(found[BASE])
    lines = [
        f"Held-out loss after the last update of STACEY with a setting changed, mean over {seeds} seeds; the change",
        "against none, seed by seed: mean, and in brackets the least and the greatest.",
        "",
        "| changed | held-out loss | difference |",
        "|---|---|---|",
    ]
    for label, losses in found.items():
        finite = [loss for loss in losses if loss is not None]
        shown = f"{statistics.fmean(finite):.4f}" if finite else "diverged"
        if 0 < len(finite) < seeds:
            shown += f" ({seeds - len(finite)} of {seeds} diverged)"
        apart = differences(found, label)
        difference = f"{statistics.fmean(apart):+.4f} [{min(apart):+.4f}, {max(apart):+.4f}]" if apart else "–"
        lines.append(f"| {label} | {shown} | {'' if label == BASE else difference} |")
    return "\n".join(lines) + "\n"


def figure(found: Found) -> Figure:
    """Draw a dot for each change and seed, by its difference."""
    labels = [label for label in found if label != BASE and differences(found, label)]
    drawn = Figure(figsize=(8, 1.2 + 0.27 * len(labels)), layout="constrained")
    axes = drawn.subplots()
    for height, label in enumerate(reversed(labels)):
        apart = differences(found, label)
        axes.plot(apart, [height] * len(apart), "o", color="#0072B2", alpha=0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(labels)), list(reversed(labels)))
    axes.set_xscale("symlog", linthresh=0.05)
    axes.set(xlabel="held-out loss against the unchanged settings: left is better")
    axes.grid(alpha=0.3)
    return drawn


EXPERIMENT = Experiment(
    "ablation",
    "what tau, alpha, p, epsilon, betas, z's start, the states' dtype and departures from the paper are worth",
    {
        "cpu": Scale(
            "0.9 M parameters, 300 updates, 33 changes; 80 minutes on two slow cores, from 26 of its 68 runs",
            2,
            {
                "overrides": {"train.max_steps": 300},
                "without_data": {},
                "changes": tuple(CHANGES),
            },
        ),
        "gpu": Scale(
            "100 M parameters, 5 000 updates, 33 changes; days on one GPU",
            2,
            {"overrides": LARGE.overrides, "without_data": LARGE.without_data, "changes": tuple(CHANGES)},
        ),
    },
    run,
    files=("sweeps/llm/base.yaml",),
)
