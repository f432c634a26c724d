"""The paper's algorithms in float64 numpy, written from the paper alone and sharing no code with the package."""

import numpy as np


def s(x, p, eps):
    exponent = 1.0 if np.isinf(p) else (p - 2) / (p - 1)
    denominator = np.abs(x) ** exponent + eps
    return np.divide(x, denominator, out=np.zeros_like(x), where=x != 0)


def mirror(z, c, alpha, p):
    u = np.abs(z) ** (p - 2) * z - alpha * c
    power = np.abs(u) ** ((p - 2) / (p - 1))
    return np.divide(u, power, out=np.zeros_like(u), where=u != 0)


def stacey(theta, gradients, lrs, *, p, variant, alpha, tau, betas, eps, weight_decay, z_init):
    """Return (theta, z, m) of algorithms 2, 3 or 4 after one step for each gradient and learning rate."""
    beta1, beta2 = betas
    z = theta.copy() if z_init == "params" else np.zeros_like(theta)
    m = np.zeros_like(theta)
    for g, lr in zip(gradients, lrs, strict=True):
        c = beta1 * m + (1 - beta1) * g
        y = theta - lr * (c if variant == "2p" else s(c, p, eps))
        z = z - alpha * c if variant == "p2" else mirror(z, c, alpha, p)
        theta = tau * z + (1 - tau) * y - lr * weight_decay * theta
        m = beta2 * m + (1 - beta2) * g
    return theta, z, m


def lp_descent(theta, gradients, lrs, *, p, eps, weight_decay):
    """Return theta of algorithm 1, with decoupled weight decay."""
    for g, lr in zip(gradients, lrs, strict=True):
        theta = theta - lr * s(g, p, eps) - lr * weight_decay * theta
    return theta
