"""Non-convex functions with known smoothness in every lp norm, for theorem 1.

Both are sums of phi(x) = x^2 / (1 + x^2) (Geman and McClure's loss): at least 0, convex for |x| < 1/sqrt(3) only, with

    phi'(x) = 2x / (1 + x^2)^2,   |phi'| <= 3 sqrt(3) / 8,        |phi''| <= 2, taken at 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LARGEST_SLOPE = 3.0 * math.sqrt(3.0) / 8.0
LARGEST_CURVATURE = 2.0


@dataclass(frozen=True)
class Objective:
    """A function to descend, with the constants of the theorem's assumptions. Its least value is 0.

    Args:
        name: what tables call it.
        value: f at the rows of a tensor of shape (n, d): shape (n,).
        gradient: of f at the rows of such a tensor, shaped as it.
        start: theta_0, shape (d,), float64.
        noise: sigma, shape (d,): one gradient has noise of +sigma_i or -sigma_i in coordinate i, at even odds.
        smoothness: L with respect to ||.||_p, for a given p.
        largest_gradient: a bound for ||nabla f||_{p*}, for a given p.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor], Tensor]
    start: Tensor
    noise: Tensor
    smoothness: Callable[[float], float]
    largest_gradient: Callable[[float], float]

    def gradient_bound(self, p: float) -> float:
        """Return G, the bound for ||g||_{p*} with its noise (assumption 4)."""
        # ||g||_{p*} <= ||nabla f||_{p*} + ||sigma||_{p*}
        return self.largest_gradient(p) + norm(self.noise, dual(p))


def dual(p: float) -> float:
    """Return p* = p / (p - 1)."""
    return 1.0 if p == math.inf else p / (p - 1.0)


def norm(x: Tensor, p: float) -> float:
    """Return ||x||_p of a vector."""
    return float(torch.linalg.vector_norm(x, p))


def phi(x: Tensor) -> Tensor:
    """Return x^2 / (1 + x^2)."""
    return x.square() / (1.0 + x.square())


def phi_slope(x: Tensor) -> Tensor:
    """Return phi'(x) = 2x / (1 + x^2)^2."""
    return 2.0 * x / (1.0 + x.square()).square()


def separable() -> Objective:
    """Return f(x) = sum_i w_i phi(x_i), w from 1 down to 1/4; from theta_0 = (1, ..., 1), where it is concave."""
    weights = torch.logspace(0, -2, 8, base=2.0, dtype=torch.float64)

    def smoothness(p: float) -> float:
        # |f(y) - f(x) - <nabla f(x), y - x>| <= 1/2 sum_i L_i (y_i - x_i)^2 with L_i = 2 w_i, and by Hoelder's
        # inequality   sum_i L_i d_i^2 <= ||L||_{p/(p-2)} ||d||_p^2        (appendix B of the paper)
        order = math.inf if p == 2.0 else 1.0 if p == math.inf else p / (p - 2.0)
        return norm(LARGEST_CURVATURE * weights, order)

    return Objective(
        "separable",
        value=lambda x: (weights * phi(x)).sum(dim=-1),
        gradient=lambda x: weights * phi_slope(x),
        start=torch.ones_like(weights),
        noise=weights.clone(),
        smoothness=smoothness,
        largest_gradient=lambda p: norm(LARGEST_SLOPE * weights, dual(p)),
    )


def regression() -> Objective:
    """Return f(x) = 1/n sum_j phi(<a_j, x - x*>), robust regression from theta_0 = 0; coordinates interact."""
    rows, dimension = 16, 4
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(rows, dimension, generator=generator, dtype=torch.float64)
    solution = torch.ones(dimension, dtype=torch.float64)
    solution[1::2] = -1.0

    def mean_power(p: float, power: int) -> float:
        return float(torch.linalg.vector_norm(features, dual(p), dim=1).pow(power).mean())

    return Objective(
        "regression",
        value=lambda x: phi((x - solution) @ features.T).mean(dim=-1),
        gradient=lambda x: phi_slope((x - solution) @ features.T) @ features / rows,
        start=torch.zeros(dimension, dtype=torch.float64),
        noise=torch.full((dimension,), 0.5, dtype=torch.float64),
        # <a_j, d>^2 <= ||a_j||_{p*}^2 ||d||_p^2, so L = 2/n sum_j ||a_j||_{p*}^2
        smoothness=lambda p: LARGEST_CURVATURE * mean_power(p, 2),
        # ||nabla f||_{p*} <= max |phi'| / n sum_j ||a_j||_{p*}
        largest_gradient=lambda p: LARGEST_SLOPE * mean_power(p, 1),
    )
