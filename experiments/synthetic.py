"""Figure 1 of the paper: optimizers on p-generalised Gaussians in the plane.

    density of N_p(mu)        exp(-||x - mu||_p^p / p), up to a factor,    mu = (2, 0)
    what is minimised         f(x) = ||x - mu||_p^p / p
    its gradient              sign(x - mu) |x - mu|^(p-1), exact: nothing is sampled but the starts

The paper says: learning rate 1e-3 for every optimizer, 5 000 iterations, starts from a standard Gaussian, 100 repeats.
It does not say STACEY's p, alpha, tau, betas and epsilon, nor anybody's weight decay. Chosen here, before anything was
run: p of the optimizer = p of the distribution, alpha = 1e-2, tau = 1e-3, betas = (0.9, 0.99), epsilon = 1e-8, as most
rows of its appendix D have them; no weight decay, which would move the minimum away from mu; AdamW and Lion with their
own default betas. What another p or alpha would have given is measured too (`SWEEP`).

All starts are rows of one tensor. Every optimizer here is element-wise, so each row moves as it would alone. Weights,
and z and m of STACEY, are float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lion_pytorch import Lion
from torch import Tensor
from torch.optim import Optimizer

from experiments.framework import Advance, Experiment, Outcome, Part, Reproduction, Scale
from experiments.synthetic_report import figure, table
from stacey_dist.optim import Stacey
from stacey_dist.optim.rule import Variant

MU = (2.0, 0.0)
DISTRIBUTIONS = (8, 4, 2)
LR = 1e-3
ALPHA = 1e-2
TAU = 1e-3
STACEY_SETTINGS: dict[str, Any] = dict(lr=LR, betas=(0.9, 0.99), eps=1e-8, state_dtype=torch.float32)
TRAJECTORY_START = (-1.0, 1.0)
SHOWN_EVERY = 20  # iterations between the points that are kept of a curve
NEAR = 0.1  # "has arrived": the distance to mu
FAR = 100.0  # "has diverged": starts are a few units from mu

OPTIMIZERS = ("STACEY(p,2)", "STACEY(p,p)", "AdamW", "Lion")
VARIANTS: dict[str, Variant] = {"STACEY(p,2)": "p2", "STACEY(p,p)": "pp"}
# Of STACEY: name, p, alpha, tau. Without acceleration, tau = 0, the variants are one, and alpha is without effect.
SWEEP = [
    *((name, p, alpha, TAU) for name in VARIANTS for p in (2, 4, 8) for alpha in (1e-4, 1e-3, 1e-2, 1e-1)),
    *(("STACEY(p,2)", p, 0.0, 0.0) for p in (2, 4, 8)),
]

MakeOptimizer = Callable[[list[Tensor]], Optimizer]


def make_optimizer(name: str, p: int, alpha: float = ALPHA, tau: float = TAU) -> MakeOptimizer:
    """Return a function that makes the optimizer of that name; p, alpha and tau are STACEY's."""
    if name == "AdamW":
        return partial(torch.optim.AdamW, lr=LR, weight_decay=0.0)
    if name == "Lion":
        return partial(Lion, lr=LR, weight_decay=0.0)
    return partial(Stacey, p=p, variant=VARIANTS[name], alpha=alpha, tau=tau, **STACEY_SETTINGS)


def gradient(x: Tensor, p: int) -> Tensor:
    """Return the gradient of the negative log-density of N_p(mu), p even, at the rows of x, shaped (n, 2) as x."""
    # nabla f(x) = sign(x - mu) |x - mu|^(p-1);  for even p that is (x - mu)^(p-1)
    return (x - x.new_tensor(MU)) ** (p - 1)


def starts(seeds: int) -> Tensor:
    """Return starts from a standard Gaussian, shape (seeds, 2), float32: row i is a function of i alone."""
    return torch.stack([torch.randn(2, generator=torch.Generator().manual_seed(seed)) for seed in range(seeds)])


def descend(start: Tensor, p: int, make: MakeOptimizer, iterations: int, advance: Advance) -> Tensor:
    """Return all points on the way: shape (iterations + 1, n, 2), from the start on."""
    x = torch.nn.Parameter(start.clone())
    optimizer = make([x])
    path = start.new_empty(iterations + 1, *start.shape)
    path[0] = start
    for iteration in range(1, iterations + 1):
        x.grad = gradient(x.detach(), p)
        optimizer.step()
        path[iteration] = x.detach()
        advance(1 / iterations)
    return path


def measure(p: int, make: MakeOptimizer, seeds: int, iterations: int, advance: Advance) -> dict[str, Any]:
    """Run one optimizer on N_p from every start, and from the start of the trajectories that are drawn."""
    rows = torch.cat([starts(seeds), torch.tensor([TRAJECTORY_START])])
    path = descend(rows, p, make, iterations, advance)
    distance = (path[:, :-1].double() - torch.tensor(MU, dtype=torch.float64)).norm(dim=-1)  # (iterations + 1, seeds)
    trajectory = path[::SHOWN_EVERY, -1]
    return summary(distance) | {"trajectory": trajectory[trajectory.isfinite().all(dim=-1)].tolist()}


def summary(distance: Tensor) -> dict[str, Any]:
    """Return what is kept of the distances to mu, shape (iterations + 1, seeds).

    Means and spreads are of the starts that never were beyond `FAR`, and None if there is none; shares are of all.
    """
    iterations, seeds = len(distance) - 1, distance.shape[1]
    stays = (distance <= FAR).all(dim=0)  # NaN is not
    kept = distance[:, stays]
    if kept.shape[1] == 0:
        return dict(diverged=1.0, arrived=0.0, arrival_median=None, mean=None)
    shown = kept[::SHOWN_EVERY]
    low, high = shown.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64), dim=1)
    # A start arrives at the iteration from which on it stays near: one past the last at which it is not.
    iteration = torch.arange(1, iterations + 2)[:, None]
    arrival = (~(distance < NEAR) * iteration).amax(dim=0)
    arrived = float((arrival <= iterations).double().mean())
    late = kept[-(iterations // 10) - 1 :]
    return {
        "diverged": float(seeds - kept.shape[1]) / seeds,
        "arrived": arrived,
        "arrival_median": float(arrival.double().quantile(0.5)) if arrived > 0.5 else None,
        "mean": shown.mean(dim=1).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "final_mean": float(kept[-1].mean()),
        "final_deviation": float(kept[-1].std(unbiased=False)),
        # How the distance changes at the end of the run, where it should stand still or fall.
        "fluctuation": float((late.amax(dim=0) - late.amin(dim=0)).mean()),
        "steps_away": float((late[1:] > late[:-1]).double().mean()),
    }


def run(reproduction: Reproduction) -> Outcome:
    """Run the four optimizers on the three distributions, then STACEY with other p and alpha."""
    iterations = reproduction.scale.settings["iterations"]

    def part(p: int, name: str, q: int, alpha: float, tau: float) -> Part:
        slug = f"{VARIANTS[name]}-p{q}-alpha{alpha:g}-tau{tau:g}" if name in VARIANTS else name.lower()
        make = make_optimizer(name, q, alpha, tau)
        return Part(f"N{p}-{slug}", partial(measure, p, make, reproduction.seeds, iterations))

    compared = {(p, name): part(p, name, p, ALPHA, TAU) for p in DISTRIBUTIONS for name in OPTIMIZERS}
    sweep = {(*settings, p): part(p, *settings) for settings in SWEEP for p in DISTRIBUTIONS}
    found, swept = reproduction.compute(compared, sweep)
    values = {compared[key].name: value for key, value in found.items()}
    values |= {sweep[key].name: value for key, value in swept.items()}  # some are in both
    return Outcome(
        {"iterations": iterations, "shown_every": SHOWN_EVERY, "parts": values},
        table(found, swept, reproduction.seeds, iterations, NEAR),
        {"synthetic": figure(found, reproduction.seeds, MU, SHOWN_EVERY, NEAR)},
    )


EXPERIMENT = Experiment(
    "synthetic",
    "figure 1: STACEY, AdamW and Lion on p-generalised Gaussians in the plane",
    {"paper": Scale("5 000 iterations from 100 starts, half a minute on a CPU", 100, {"iterations": 5000})},
    run,
)
