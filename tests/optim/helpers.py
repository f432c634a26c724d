"""Small runs of an optimizer on given gradients."""

import torch


def make_problem(size=1237, steps=50, dtype=torch.float32, seed=0):
    """Return a start and gradients of the size of ordinary weights; a few gradients are exactly zero."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(size, generator=generator) * 0.02
    gradients = torch.randn(steps, size, generator=generator)
    gradients[:, :7] = 0.0
    gradients[::2, 7:14] = 0.0
    return theta.to(dtype), gradients.to(dtype)


def run(optimizer_class, theta, gradients, lrs=None, **settings):
    """Return the parameter and its state after a step for each gradient."""
    param = torch.nn.Parameter(theta.clone())
    optimizer = optimizer_class([param], **settings)
    for index, g in enumerate(gradients):
        if lrs is not None:
            optimizer.param_groups[0]["lr"] = lrs[index]
        param.grad = g.clone()
        optimizer.step()
    return param.detach(), optimizer.state[param]
