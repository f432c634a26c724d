"""How well a bfloat16 z follows a float32 one, by each rounding: the plot docs/explanation/rounding.png.

python benchmarks/rounding.py [FILE]
"""

import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.nn import Parameter

from stacey_dist import Stacey

STEPS, ELEMENTS, EVERY = 4000, 200_000, 40
ROUNDINGS = {
    "float32": ("float32", "nearest"),
    "stochastic": ("bfloat16", "stochastic"),
    "nearest": ("bfloat16", "nearest"),
}


def main(file: str) -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(ELEMENTS, generator=generator) * 0.02
    drift = torch.randn(ELEMENTS, generator=generator) * 1e-3
    runs = {}
    for name, (state_dtype, rounding) in ROUNDINGS.items():
        param = Parameter(start.clone())
        optimizer = Stacey(
            [param], 1e-4, p=2.8, alpha=1e-3, tau=1e-3, betas=(0.9, 0.99), state_dtype=state_dtype, rounding=rounding
        )
        runs[name] = (param, optimizer)
    steps: list[int] = []
    kept: dict[str, list[float]] = {name: [] for name in ROUNDINGS}
    errors: dict[str, list[float]] = {name: [] for name in ROUNDINGS}
    for step in range(1, STEPS + 1):
        gradient = drift + torch.randn(ELEMENTS, generator=generator) * 1e-2
        for param, optimizer in runs.values():
            param.grad = gradient
            optimizer.step()
        if step % EVERY:
            continue
        steps.append(step)
        z = {name: optimizer.state[param]["z"].double() for name, (param, optimizer) in runs.items()}
        movement = z["float32"] - start.double()
        for name in ROUNDINGS:
            kept[name].append(float((z[name] - start.double()) @ movement / (movement @ movement)))
            errors[name].append(float((z[name] - z["float32"]).mean().abs() / movement.abs().mean()))
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, text in (("stochastic", "bfloat16, rounded stochastically"), ("nearest", "bfloat16, rounded to nearest")):
        axes.plot(steps, kept[name], label=text)
    axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--", label="float32")
    axes.set(xlabel="updates", ylabel="share of float32 z's movement that z made", ylim=(-0.05, 1.15))
    axes.legend(loc="center right")
    figure.savefig(file, dpi=120)
    for name in ("stochastic", "nearest"):
        print(
            f"z in bfloat16, {name}: after {STEPS:,} updates of {ELEMENTS:,} elements it has made "
            f"{kept[name][-1]:.4f} of float32 z's movement; mean error {errors[name][-1]:.2%} of the mean movement"
        )


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/explanation/rounding.png")
