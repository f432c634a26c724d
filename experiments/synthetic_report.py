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

Swept = Mapping[tuple[str, int, float, float, int], dict[str, Any]]
"""The same, by variant, p of the optimizer, alpha, tau and p of the distribution."""


def figure(found: Found, seeds: int, mu: Sequence[float], shown_every: int, near: float) -> Figure:
    """Draw trajectories from one start above; below, the mean distance over all starts, with its spread."""
    distributions = list(dict.fromkeys(p for p, _ in found))
    drawn = Figure(figsize=(12.5, 7.4), layout="constrained")
    panels = drawn.subplots(2, len(distributions), squeeze=False)
    for above, below, p in zip(panels[0], panels[1], distributions, strict=True):
        _level_sets(above, p, mu)
        for name, style in STYLES.items():
            values = found[p, name]
            above.plot(*zip(*values["trajectory"], strict=True), label=name, linewidth=1.8, **style)
            if values["mean"] is None:
                continue
            color = style["color"]
            iterations = np.arange(len(values["mean"])) * shown_every
            below.plot(iterations, values["mean"], linewidth=1.8, **style)
            below.fill_between(iterations, values["low"], values["high"], color=color, alpha=0.15, linewidth=0)
        above.plot(*values["trajectory"][0], "o", color="black", linestyle="", label="start")
        above.plot(*mu, "*", color="black", linestyle="", markersize=12, label="µ")
        title = f"$N_{p}$" + (" (the two STACEY are one at p = 2)" if p == 2 else "")
        above.set(title=title, xlabel="$x_1$", ylabel="$x_2$", xlim=(-1.4, 3.6), ylim=(-1.5, 1.7), aspect="equal")
        below.axhline(near, color="black", linewidth=0.7, alpha=0.5)
        below.set(yscale="log", ylim=(1e-5, 10), xlim=(0, iterations[-1]), xlabel="iteration")
        below.set_ylabel("distance to µ, Euclidean")
        below.grid(alpha=0.3)
        gone = [f"{name}: {found[p, name]['diverged']:.0%}" for name in STYLES if found[p, name]["diverged"] > 0]
        if gone:
            below.text(0.03, 0.05, "diverged\n" + "\n".join(gone), transform=below.transAxes, fontsize=9)
    drawn.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(STYLES) + 2)
    drawn.suptitle(
        "Descent of the negative log-density of $N_p(µ)$, learning rate 1e-3. Above: one start; grey: level sets.\n"
        f"Below: mean over those of {seeds} starts from a standard Gaussian that did not diverge; bands: 10th to "
        f"90th percentile; thin line: {near:g}",
        fontsize=11,
    )
    return drawn


def _level_sets(axes: Any, p: int, mu: Sequence[float]) -> None:
    x, y = np.meshgrid(np.linspace(-1.4, 3.6, 200), np.linspace(-1.5, 1.7, 130))
    norm = (np.abs(x - mu[0]) ** p + np.abs(y - mu[1]) ** p) ** (1 / p)
    axes.contour(x, y, norm, levels=np.arange(0.4, 4, 0.4), colors="0.8", linewidths=0.7)


def table(found: Found, swept: Swept, seeds: int, iterations: int, near: float) -> str:
    """Return the comparison, and what other settings of STACEY would have given, in Markdown."""
    early, middle = iterations // 5, 2 * iterations // 5
    lines = [
        f"Distance to µ from {seeds} starts: the share of starts that diverged (were ever more than 100 from µ, or",
        f"not finite); of the others the mean after {early:,}, {middle:,} and {iterations:,} iterations (± standard",
        f"deviation over starts); the share of all that at the end stays under {near:g}, and the iteration from which",
        "on (median over starts; – if half or more never do); over the last "
        f"{iterations // 10:,} iterations, of those that",
        "did not diverge, the highest minus the lowest distance (mean over starts) and the share of steps that lead",
        "away from µ.",
        "",
        f"| | optimizer | diverged | {early:,} | {middle:,} | {iterations:,} | < {near:g} | from | high − low | away |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (p, name), values in found.items():
        arrived = f"{values['arrived']:.0%} | {arrival(values)}"
        cells = f"| N{p} | {name} | {values['diverged']:.0%} "
        if (mean := values["mean"]) is None:
            lines.append(f"{cells}| – | – | – | {arrived} | – | – |")
            continue
        last = len(mean) - 1
        final = f"{values['final_mean']:.3g} ± {values['final_deviation']:.2g}"
        late = f"{values['fluctuation']:.2g} | {values['steps_away']:.0%}"
        lines.append(f"{cells}| {mean[last // 5]:.3g} | {mean[2 * last // 5]:.3g} | {final} | {arrived} | {late} |")
    distributions = list(dict.fromkeys(p for p, _ in found))
    heads = " | ".join(f"N{p}" for p in distributions)
    lines += [
        "",
        f"STACEY with other p, α and τ: the mean distance after {iterations:,} iterations of the starts that did not",
        f"diverge; in brackets the share of all that at the end stays under {near:g}, and of those that diverged.",
        "",
        f"| optimizer | p | α | τ | {heads} |",
        "|---" * (4 + len(distributions)) + "|",
    ]
    for name, q, alpha, tau in dict.fromkeys(key[:4] for key in swept):
        cells = " | ".join(_cell(swept[name, q, alpha, tau, p]) for p in distributions)
        lines.append(f"| {name} | {q} | {alpha:g} | {tau:g} | {cells} |")
    return "\n".join(lines) + "\n"


def arrival(values: dict[str, Any]) -> str:
    """Return the median iteration of arrival, if more than half arrive."""
    return "–" if values["arrival_median"] is None else f"{values['arrival_median']:,.0f}"


def _cell(values: dict[str, Any]) -> str:
    diverged = f", {values['diverged']:.0%} diverged" if values["diverged"] else ""
    mean = "–" if values["mean"] is None else f"{values['final_mean']:.2g}"
    return f"{mean} ({values['arrived']:.0%}{diverged})"
