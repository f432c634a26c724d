"""The figure and the table of the synthetic experiment."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart.
STYLES: dict[str, dict[str, Any]] = {
    "STACEY(p,2)": dict(color="#0072B2", linestyle="-"),
    "STACEY(p,p)": dict(color="#009E73", linestyle="--"),
    "AdamW": dict(color="#E69F00", linestyle="-."),
    "Lion": dict(color="#CC3311", linestyle=":"),
}

Found = Mapping[tuple[int, str], dict[str, Any]]
"""What was measured, by p of the distribution and name of the optimizer."""

Swept = Mapping[tuple[str, float, float, int], dict[str, Any]]
"""The same, by variant, p of the optimizer, alpha and p of the distribution."""


def figure(found: Found, seeds: int, mu: Sequence[float], shown_every: int, near: float) -> Figure:
    """Trajectories from one start above; below, the mean distance over all starts, with its spread."""
    distributions = list(dict.fromkeys(p for p, _ in found))
    drawn = Figure(figsize=(13, 7.6), layout="constrained")
    panels = drawn.subplots(2, len(distributions), squeeze=False)
    for above, below, p in zip(panels[0], panels[1], distributions, strict=True):
        _level_sets(above, p, mu)
        for name, style in STYLES.items():
            values = found[p, name]
            above.plot(*zip(*values["trajectory"], strict=True), label=name, linewidth=1.8, **style)
            iterations = np.arange(len(values["mean"])) * shown_every
            below.plot(iterations, values["mean"], linewidth=1.8, **style)
            below.fill_between(iterations, values["low"], values["high"], color=style["color"], alpha=0.15, linewidth=0)
        above.plot(*values["trajectory"][0], "o", color="black", linestyle="", label="start")
        above.plot(*mu, "*", color="black", linestyle="", markersize=12, label="µ")
        above.set(title=f"$N_{p}$", xlabel="$x_1$", ylabel="$x_2$", xlim=(-1.4, 3.6), ylim=(-1.5, 1.7), aspect="equal")
        below.axhline(near, color="black", linewidth=0.7, alpha=0.5)
        below.set(yscale="log", ylim=(1e-5, 10), xlim=(0, iterations[-1]), xlabel="iteration")
        below.set_ylabel("distance to µ, Euclidean")
        below.grid(alpha=0.3)
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES) + 2)
    drawn.suptitle(
        f"Descent of the negative log-density of $N_p(µ)$, learning rate 1e-3. Above: from one start; grey: level sets.\n"
        f"Below: mean over {seeds} starts from a standard Gaussian; bands: 10th to 90th percentile; thin line: {near:g}",
        fontsize=11,
    )
    return drawn


def _level_sets(axes: Any, p: int, mu: Sequence[float]) -> None:
    x, y = np.meshgrid(np.linspace(-1.4, 3.6, 200), np.linspace(-1.5, 1.7, 130))
    norm = (np.abs(x - mu[0]) ** p + np.abs(y - mu[1]) ** p) ** (1 / p)
    axes.contour(x, y, norm, levels=np.arange(0.4, 4, 0.4), colors="0.8", linewidths=0.7)


def table(found: Found, swept: Swept, seeds: int, iterations: int, near: float) -> str:
    """The comparison, and what other settings of STACEY would have given, in Markdown."""
    early, middle = iterations // 5, 2 * iterations // 5
    lines = [
        f"Distance to µ over {seeds} starts: means after {early:,}, {middle:,} and {iterations:,} iterations (± standard",
        f"deviation over starts); the iteration from which on it stays under {near:g} (median over starts; – if half or",
        f"more never do) and the share of starts that do; and over the last {iterations // 10:,} iterations, highest minus",
        "lowest distance (mean over starts) and the share of steps that lead away from µ.",
        "",
        f"| distribution | optimizer | {early:,} | {middle:,} | {iterations:,} "
        f"| under {near:g} from | share | high − low | steps away |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (p, name), values in found.items():
        mean, last = values["mean"], len(values["mean"]) - 1
        lines.append(
            f"| N{p} | {name} | {mean[last // 5]:.3g} | {mean[2 * last // 5]:.3g} "
            f"| {values['final_mean']:.3g} ± {values['final_deviation']:.2g} | {arrival(values)} | {values['arrived']:.0%} "
            f"| {values['fluctuation']:.2g} | {values['steps_away']:.0%} |"
        )
    distributions = list(dict.fromkeys(p for p, _ in found))
    heads = [f"N{p}" for p in distributions]
    lines += [
        "",
        f"STACEY with other p and α: mean distance after {iterations:,} iterations (in brackets, the median iteration from",
        f"which on it stays under {near:g}).",
        "",
        f"| optimizer | p | α | {' | '.join(heads)} |",
        "|---" * (3 + len(heads)) + "|",
    ]
    for name, q, alpha in dict.fromkeys(key[:3] for key in swept):
        cells = [swept[name, q, alpha, p] for p in distributions]
        shown = (f"{values['final_mean']:.3g} ({arrival(values)})" for values in cells)
        lines.append(f"| {name} | {q:g} | {alpha:g} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def arrival(values: dict[str, Any]) -> str:
    """The median iteration of arrival, if more than half arrive."""
    return "–" if values["arrival_median"] is None else f"{values['arrival_median']:,.0f}"
