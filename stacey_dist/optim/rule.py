"""The update rule: the STACEY family and stochastic lp descent, one coordinate at a time.

This is the one place where the rule stands. It is plain torch, runs in float32 (the bits are part of the
definition: see `power.py`) and in float64, and every faster kernel is a translation of it. Every operation is
element-wise: an element's new value depends on its own weight, gradient, z and m and on the settings, never on
its position, so a shard of the result is the result of the shard.

Notation, as in the paper: theta the weight, g the gradient, m the momentum, z the dual (mirror) sequence,
eta = `lr`, alpha the dual step, tau the coupling, lambda = `weight_decay`, beta1 and beta2 = `betas`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stacey_dist.optim.power import exp2_sum, log2_parts, power, split

Variant = Literal["p2", "pp", "2p"]

# What rounds to a half in float32, in which kernels have beta.
_HALF = 0.5 - 2.0**-26


@dataclass(frozen=True, slots=True)
class StaceySettings:
    """The numbers of one STACEY step, as the paper names them.

    `log2_alpha` is log2(alpha) as (whole, fraction) for a mirror step; None: worked out from alpha.
    """

    lr: float
    p: float
    variant: Variant
    alpha: float
    tau: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    log2_alpha: tuple[float, float] | None = None


def stacey_update(
    theta: Tensor, g: Tensor, z: Tensor, m: Tensor, settings: StaceySettings
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of STACEY(p,2), (p,p) or (2,p): algorithms 2, 3 and 4.

    All tensors share a shape and a dtype (float32 or float64); none is modified. Returns the new (theta, z, m).
    """
    s = settings
    # c = beta1 m + (1 - beta1) g        m' = beta2 m + (1 - beta2) g
    c = interpolate(m, g, s.beta1)
    m_new = interpolate(m, g, s.beta2)

    # primal step   y = theta - eta s(c)    or, for (2,p),    y = theta - eta c
    direction = c if s.variant == "2p" else steepest_direction(c, s.p, s.eps)

    # dual step     z' = z - alpha c        or, for (p,p) and (2,p), the mirror step
    z_new = z - c * s.alpha if s.variant == "p2" else mirror_step(z, c, s.alpha, s.p, s.log2_alpha)

    # coupling      theta' = tau z' + (1 - tau) y - eta lambda theta
    # as theta + [tau z' - (tau + eta lambda) theta - (1 - tau) eta s]: theta is rounded once and never multiplied by a
    # number near one.
    change = (z_new * s.tau).sub_(theta * (s.tau + s.lr * s.weight_decay)).sub_(direction * ((1.0 - s.tau) * s.lr))
    return change.add_(theta), z_new, m_new


def interpolate(m: Tensor, g: Tensor, beta: float) -> Tensor:
    """beta m + (1 - beta) g, from the nearer end: coefficients rounded by themselves would not add up to one."""
    if beta >= _HALF:
        return (g - m).mul_(1.0 - beta).add_(m)
    return (m - g).mul_(beta).add_(g)


def lp_descent_update(theta: Tensor, g: Tensor, *, lr: float, p: float, eps: float, weight_decay: float) -> Tensor:
    """One step of stochastic lp descent, algorithm 1, with decoupled weight decay: the new theta."""
    # theta' = theta - eta s(g) - eta lambda theta
    change = steepest_direction(g, p, eps) * lr
    if weight_decay != 0.0:
        change.add_(theta * (lr * weight_decay))
    return theta - change


def steepest_direction(x: Tensor, p: float, eps: float) -> Tensor:
    """s(x) = x / (|x|^((p-2)/(p-1)) + eps), and s(0) = 0; p = infinity gives x / (|x| + eps), the sign."""
    exponent = 1.0 if p == math.inf else (p - 2.0) / (p - 1.0)
    # + 1 at x = 0, where the quotient would be 0/0 without eps.
    return x / (power(x.abs(), exponent) + eps).add_(x == 0)


def log2_in_parts(alpha: float) -> tuple[float, float]:
    """log2(alpha) as (whole, fraction); (0, 0) for alpha = 0, of which no use is made."""
    log = math.log2(alpha) if alpha > 0.0 else 0.0
    return float(round(log)), log - round(log)


def mirror_step(z: Tensor, c: Tensor, alpha: float, p: float, log2_alpha: tuple[float, float] | None = None) -> Tensor:
    """The dual step of (p,p) and (2,p): u = |z|^(p-2) z - alpha c,  z' = sign(u) |u|^(1/(p-1)).

    |z|^(p-1) underflows in float32 for ordinary weights at p = 16, and |z|^(p-1) followed by its root would lose
    z's last bits at every step. So the larger of the two terms of u is taken out of the root:

        z' = z (1 + t)^r                        where |z|^(p-1) >= alpha |c|
        z' = -sign(c) (alpha |c|)^r (1 + t)^r   elsewhere,             r = 1 / (p - 1)

    with t the smaller term over the larger one, from the difference of their logarithms. c = 0 leaves z exactly
    as it is. NaN or infinity in z or c gives NaN or infinity.
    """
    if p == 2.0:
        return z - c * alpha
    if alpha == 0.0:
        return z + c * 0.0
    size_z, size_c = z.abs(), c.abs()
    z_whole, z_fraction = log2_parts(size_z)
    c_whole, c_fraction = log2_parts(size_c)
    alpha_whole, alpha_fraction = log2_alpha or log2_in_parts(alpha)
    c_whole.add_(alpha_whole)
    c_fraction.add_(alpha_fraction)
    # gap = log2(|z|^(p-1)) - log2(alpha |c|);  |t| = 2^-|gap|
    high, low = split(p - 1.0)
    gap_high = (z_whole * high).sub_(c_whole)
    gap_low = (z_whole * low).add_(z_fraction * (p - 1.0)).sub_(c_fraction)
    gap = gap_high + gap_low
    c_larger = (gap < 0).to(z.dtype)
    z_larger = 1.0 - c_larger
    toward_larger = c_larger - z_larger  # the sign of -gap
    t = exp2_sum(gap_high.mul_(toward_larger), gap_low.mul_(toward_larger))
    # The two terms of u are z's and -c's; t is negative where they oppose each other.
    t.copysign_(z).mul_(torch.ones_like(c).copysign_(c).neg_())
    # |z'| = larger^r (1 + t)^r = [|z| or 1] * 2^(r log2(1 + t) + [0 or r log2(alpha |c|)])
    ratio_whole, ratio_fraction = log2_parts(t.add_(1.0))
    root = 1.0 / (p - 1.0)
    high, low = split(root)
    c_whole.mul_(c_larger)
    whole = ratio_whole.add_(c_whole)
    fraction = ratio_fraction.add_(c_fraction.mul_(c_larger))
    growth = exp2_sum(whole * high, (whole * low).add_(fraction.mul_(root)))
    size = growth.mul_(size_z.mul_(z_larger).add_(c_larger))
    sign = torch.copysign(z_larger, z).sub_(c_larger.copysign_(c))
    return size.mul_(sign).add_(z - z).add_(c - c)
