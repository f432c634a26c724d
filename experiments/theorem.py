"""Theorem 1 of the paper, measured: how fast the gradient falls with the number of gradients taken.

Algorithm 1, theta_{t+1} = theta_t - eta s(g_t), takes T steps; g_t is the mean of n_t = T noisy gradients, so
N = T^2 are taken in all. With eta = 1 / (sqrt(L) G^(1/(p-1)) sqrt(T)) the theorem says

    E[1/T sum_t ||nabla f(theta_t)||_{p*}^{p*}]  <=  N^(-1/4) C,
    C = sqrt(L) G^(1/(p-1)) (f(theta_0) - f(theta*) + 1/2)  +  (2p-1)/(p-1) G^(1/(p-1)) ||sigma||_1.

Measured is the left side for T = 16, 32, ...; it is to fall as N^(-1/4) or faster for large N, and to stay under the
right side. The functions are those of `objectives`, whose L, G and sigma are known.

All seeds are rows of one tensor, and so is one more row without noise: the update is element-wise. float64. The noise
of a mean over T gradients, each +sigma or -sigma at even odds, is drawn as what it is: (2 B - T) sigma / T with B
binomial.
"""

import math
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.framework import Advance, Experiment, Outcome, Part, Reproduction, Scale
from experiments.objectives import Objective, dual, norm, regression, separable
from experiments.theorem_report import figure, table
from stacey_dist.optim import LpDescent

NORMS = (2.0, 3.0, 4.0, 8.0, math.inf)
OBJECTIVES = (separable, regression)


def step_size(objective: Objective, p: float, steps: int) -> float:
    """Return the theorem's eta for T = `steps`."""
    # eta = 1 / (L^(1/2) G^(1/(p-1)) T^(1/2))
    return 1.0 / (math.sqrt(objective.smoothness(p) * steps) * _bounded_power(objective, p))


def bound(objective: Objective, p: float, steps: int) -> float:
    """Return the right side of the theorem for N = `steps`^2."""
    gap = float(objective.value(objective.start[None]))
    ratio = 2.0 if p == math.inf else (2.0 * p - 1.0) / (p - 1.0)
    # N^(-1/4) [L^(1/2) G^(1/(p-1)) (f(theta_0) - f(theta*) + 1/2) + (2p-1)/(p-1) G^(1/(p-1)) ||sigma||_1]
    descent = math.sqrt(objective.smoothness(p)) * (gap + 0.5)
    return _bounded_power(objective, p) * (descent + ratio * norm(objective.noise, 1)) / math.sqrt(steps)


def _bounded_power(objective: Objective, p: float) -> float:
    # G^(1/(p-1))
    return 1.0 if p == math.inf else float(objective.gradient_bound(p) ** (1.0 / (p - 1.0)))


def noise_of_batches(objective: Objective, seeds: int, steps: int) -> Tensor:
    """Return the noise of every step's batch of `steps` gradients, (steps, seeds, d); seed i's is a function of i."""
    shape = (steps, len(objective.start))
    counts = [np.random.default_rng([seed, steps]).binomial(steps, 0.5, shape) for seed in range(seeds)]
    # sigma times the mean of T signs, (2 B - T) / T
    return torch.from_numpy(2.0 * np.stack(counts, axis=1) - steps).mul_(objective.noise / steps)


def average_gradient(objective: Objective, p: float, noise: Tensor, advance: Advance) -> list[float]:
    """Run algorithm 1 for T updates, one run for each column of `noise`, which has shape (T, runs, d).

    `advance` is called with 1 for each update.
    Returns 1/T sum_t ||nabla f(theta_t)||_{p*}^{p*}, t from 0 to T - 1, of each run.
    """
    steps, runs, _ = noise.shape
    theta = torch.nn.Parameter(objective.start.repeat(runs, 1))
    optimizer = LpDescent([theta], lr=step_size(objective, p, steps), p=p)
    total = torch.zeros(runs, dtype=torch.float64)
    for step in range(steps):
        exact = objective.gradient(theta.detach())
        # ||nabla f||_{p*}^{p*} = sum_i |nabla f_i|^{p*}
        total += exact.abs().pow(dual(p)).sum(dim=-1)
        theta.grad = exact + noise[step]
        optimizer.step()
        advance(1)
    return [float(value) / steps for value in total]


def measure(objective: Objective, p: float, lengths: list[int], seeds: int, advance: Advance) -> dict[str, Any]:
    """Measure every length of run, with noise for every seed and without."""
    noisy, exact = [], []
    for steps in lengths:
        noise = noise_of_batches(objective, seeds, steps)
        noise = torch.cat([noise, torch.zeros_like(noise[:, :1])], dim=1)
        *runs, without = average_gradient(objective, p, noise, lambda done: advance(done / sum(lengths)))
        noisy.append(runs)
        exact.append(without)
    return {
        "steps": lengths,
        "noisy": noisy,
        "noise_free": exact,
        "bound": [bound(objective, p, steps) for steps in lengths],
        "L": objective.smoothness(p),
        "G": objective.gradient_bound(p),
    }


def run(reproduction: Reproduction) -> Outcome:
    """Measure both functions with every p."""
    lengths = [2**power for power in range(4, reproduction.scale.settings["largest_power"] + 1)]

    def part(objective: Objective, p: float) -> Part:
        name = f"{objective.name}-p{p:g}"
        return Part(name, partial(measure, objective, p, lengths, reproduction.seeds))

    parts = {(made.name, p): part(made, p) for made in (make() for make in OBJECTIVES) for p in NORMS}
    (found,) = reproduction.compute(parts)
    return Outcome(
        {"parts": {parts[key].name: value for key, value in found.items()}}, table(found), {"theorem": figure(found)}
    )


EXPERIMENT = Experiment(
    "theorem",
    "theorem 1: how the dual norm of the gradient falls with the number of gradients, algorithm 1",
    {"cpu": Scale("T from 16 to 32 768, N up to a thousand million; a minute on a CPU", 32, {"largest_power": 15})},
    run,
)
