"""The update rule: the STACEY family and stochastic lp descent, one coordinate at a time.

This is the only definition of the rule. It is plain torch, and runs in float32 (the bits are part of the
definition: see `power.py`) and in float64. Every faster kernel is a translation of it. Every operation is
element-wise: an element's new value depends on its own weight, gradient, z and m and on the settings, never on
its position, so updating a shard gives that shard of the whole update.

Notation, as in the paper: theta the weight, g the gradient, m the momentum, z the dual (mirror) sequence,
eta = `lr`, alpha the dual step, tau the coupling, lambda = `weight_decay`, beta1 and beta2 = `betas`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stacey_dist.optim.power import (
    ZERO_EXPONENT,
    exp2_parts,
    exp2_times,
    log2_near_one,
    log2_parts,
    multiply_add,
    nearest_integer,
    power,
    product_less,
    product_parts,
)

Variant = Literal["p2", "pp", "2p"]

# The smallest float64 that rounds to 0.5 in float32: the comparison here then decides as the kernels' in float32 does.
HALF = 0.5 - 2.0**-26
# The largest log2(alpha) in a mirror step: `power.exp2_times` takes the exponent of alpha |c| then.
MAX_LOG2_ALPHA = 120.0


@dataclass(frozen=True, slots=True, kw_only=True)
class StaceySettings:
    """The numbers of one STACEY step, as the paper names them.

    `log2_alpha` is log2(alpha) as (whole, fraction), for the mirror step. None: it is computed from `alpha`.
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
    """Make one step of STACEY(p,2), (p,p) or (2,p): algorithms 2, 3 and 4.

    All tensors share a shape and a dtype (float32 or float64); none is modified. Returns the new (theta, z, m).
    """
    s = settings
    # c = beta1 m + (1 - beta1) g        m' = beta2 m + (1 - beta2) g
    c = interpolate(m, g, s.beta1)
    m_new = interpolate(m, g, s.beta2)

    # primal step   y = theta - eta s(c)    or, for (2,p),    y = theta - eta c
    direction = c if s.variant == "2p" else steepest_direction(c, s.p, s.eps)

    # dual step     z' = z - alpha c        or, for (p,p) and (2,p), the mirror step
    z_new = multiply_add(c, -s.alpha, z) if s.variant == "p2" else mirror_step(z, c, s.alpha, s.p, s.log2_alpha)

    # coupling      theta' = tau z' + (1 - tau) y - eta lambda theta
    # as theta + [tau z' - (tau + eta lambda) theta - (1 - tau) eta s]: theta is rounded once and never multiplied by a
    # number near one.
    change = multiply_add(theta, -(s.tau + s.lr * s.weight_decay), z_new * s.tau)
    change = multiply_add(direction, -((1.0 - s.tau) * s.lr), change)
    return change.add_(theta), z_new, m_new


def interpolate(m: Tensor, g: Tensor, beta: float) -> Tensor:
    """Return beta m + (1 - beta) g, from the nearer end: coefficients rounded separately would not add up to one."""
    if beta >= HALF:
        return multiply_add(g - m, 1.0 - beta, m)
    return multiply_add(g - m, -beta, g)


def lp_descent_update(theta: Tensor, g: Tensor, *, lr: float, p: float, eps: float, weight_decay: float) -> Tensor:
    """Make one step of stochastic lp descent, algorithm 1, with decoupled weight decay; return the new theta."""
    # theta' = theta - eta s(g) - eta lambda theta
    change = steepest_direction(g, p, eps) * lr
    if weight_decay != 0.0:
        change.add_(theta * (lr * weight_decay))
    return theta - change


def steepest_exponent(p: float) -> float:
    """Return (p-2)/(p-1), the power of |x| in s(x); 1 for p = infinity."""
    return 1.0 if p == math.inf else (p - 2.0) / (p - 1.0)


def steepest_direction(x: Tensor, p: float, eps: float) -> Tensor:
    """Return s(x) = x / (|x|^((p-2)/(p-1)) + eps), s(0) = 0; for p = infinity x / (|x| + eps), the sign."""
    exponent = steepest_exponent(p)
    # + 1 at x = 0, where the quotient would be 0/0 without eps.
    return x / (power(x.abs(), exponent) + eps).add_(x == 0)


def log2_in_parts(alpha: float) -> tuple[float, float]:
    """Return log2(alpha), at most `MAX_LOG2_ALPHA`, as (whole, fraction). For alpha = 0 return (0, 0), unused."""
    log = min(math.log2(alpha), MAX_LOG2_ALPHA) if alpha > 0.0 else 0.0
    return float(round(log)), log - round(log)


def scale_with_lr(lr: Tensor, reference: float, alpha: float, tau: float, dtype: torch.dtype) -> Tensor:
    """Return tau and alpha scaled with the learning rate, for `Stacey(lr_reference=...)`.

        factor = lr / lr_reference        tau' = min(1, tau factor)        alpha' = alpha factor

    The paper's are constant: at lr = 0 a weight still moves, toward z. Here lr = 0 leaves weights and z exactly as they
    are. These are IEEE-754 operations and `log2_parts`, so the host and a GPU work out the same bits.

    Args:
        lr: the learning rate, a float64 tensor of shape (1,).
        reference: the learning rate at which alpha and tau hold.
        alpha: the dual step size at the reference.
        tau: the coupling at the reference.
        dtype: float32 or float64, in which the update is computed; the factor is rounded to it.

    Returns alpha', tau' and log2(alpha') as (whole, fraction): four float64 numbers on lr's device.
    """
    # Divide by a tensor. For a Python number, CUDA multiplies by the reciprocal, which gives other bits.
    factor = (lr / torch.full_like(lr, reference)).to(dtype)
    whole, fraction = (part.double() for part in log2_parts(factor))
    alpha_whole, alpha_fraction = log2_in_parts(alpha)
    fraction += alpha_fraction  # within [-1, 2]; its integer part is moved to `whole`
    carry = fraction.round()
    whole = (whole + alpha_whole + carry).clamp(max=MAX_LOG2_ALPHA)
    factor = factor.double()
    return torch.cat([factor * alpha, (factor * tau).clamp(max=1.0), whole, fraction - carry])


def mirror_step(z: Tensor, c: Tensor, alpha: float, p: float, log2_alpha: tuple[float, float] | None = None) -> Tensor:
    """Make the dual step of (p,p) and (2,p): u = |z|^(p-2) z - alpha c,  z' = sign(u) |u|^(1/(p-1)).

    |z|^(p-1) underflows in float32 for ordinary weights at p = 16, and |z|^(p-1) followed by its root would lose
    z's last bits at every step. So the larger of the two terms of u is factored out of the root:

        z' = z (1 + ratio)^r                        where |z|^(p-1) >= alpha |c|
        z' = -sign(c) (alpha |c|)^r (1 + ratio)^r   elsewhere,             r = 1 / (p - 1)

    `ratio` is the smaller term over the larger one, negative if they have opposite signs. It is computed as 2^-|gap|,
    where gap = k + t is the difference of their logarithms. If c is 0, z is returned unchanged. NaN or infinity in z or
    c gives NaN or infinity.
    """
    if p == 2.0:
        return multiply_add(c, -alpha, z)
    if alpha == 0.0:
        return z + c * 0.0
    size_z, size_c = z.abs(), c.abs()
    z_whole, z_fraction = log2_parts(size_z)
    z_whole.masked_fill_(z == 0.0, ZERO_EXPONENT)
    # log2(alpha |c|)
    c_whole, c_fraction = log2_parts(size_c)
    alpha_whole, alpha_fraction = log2_alpha or log2_in_parts(alpha)
    c_whole.add_(alpha_whole).masked_fill_(c == 0.0, ZERO_EXPONENT)
    c_fraction.add_(alpha_fraction)
    # gap = log2(|z|^(p-1)) - log2(alpha |c|) = k + t
    gap = multiply_add(z_whole + z_fraction, p - 1.0, -(c_whole + c_fraction))
    k = nearest_integer(gap)
    t = product_less(z_whole, z_fraction, p - 1.0, k + c_whole).sub_(c_fraction)
    # The smaller term of u over the larger one is 2^-|gap|; below 2^-25 it does not change 1 + ratio. The terms are z's
    # and -c's; the ratio is negative where they oppose each other.
    c_larger = gap < 0.0
    ratio = exp2_parts(-k.abs().clamp_max_(100.0), torch.where(c_larger, t, -t))
    ratio.copysign_(z).mul_(torch.ones_like(c).copysign_(c).neg_())
    # z' = [z or -sign(c)] 2^(r (log2(1 + ratio) + [0 or log2(alpha |c|)]))
    whole, fraction = log2_near_one(ratio.add_(1.0))
    whole = torch.where(c_larger, whole + c_whole, whole)
    fraction = torch.where(c_larger, fraction + c_fraction, fraction)
    start = torch.where(c_larger, torch.ones_like(c).copysign_(-c), z)
    z_new = exp2_times(start, *product_parts(whole, fraction, 1.0 / (p - 1.0)))
    return z_new.add_(z - z).add_(c - c)
