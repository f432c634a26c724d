"""The optimizer that a configuration names, over parameter groups with and without decay."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stacey_dist.optim import LpDescent, Stacey
from stacey_dist.training.config import OptimizerConfig


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: decayed, and (norms and biases, by default) not decayed."""
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for param in model.parameters():  # lists a tied parameter once
        if param.requires_grad:
            groups[param.dim() < 2 and not config.decay_norms_and_biases].append(param)
    decays = (config.weight_decay, 0.0)
    return [{"params": g, "weight_decay": d} for g, d in zip(groups, decays, strict=True) if g]


def build_optimizer(model: nn.Module, config: OptimizerConfig, seed: int, *, by_owner: bool = False) -> Optimizer:
    """The optimizer of `config` over the model's trainable parameters; `seed` is of stacey's stochastic rounding.

    With `by_owner` it is torch's ZeroRedundancyOptimizer around it: each parameter is updated by one process, which
    alone has its state, and sent to the others.
    """
    optimizer_class, settings = _class_and_settings(config, seed)
    groups = parameter_groups(model, config)
    if by_owner:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(groups, optimizer_class, **settings)
    return optimizer_class(groups, **settings)


def _class_and_settings(config: OptimizerConfig, seed: int) -> tuple[type[Optimizer], dict[str, Any]]:
    settings: dict[str, Any] = dict(lr=config.lr)
    adaptive = dict(settings, betas=config.betas, eps=config.eps, fused=True)
    match config.name:
        case "stacey":
            names = ("p", "variant", "alpha", "tau", "betas", "eps", "z_init", "state_dtype", "rounding")
            return Stacey, settings | {name: getattr(config, name) for name in names} | {"seed": seed}
        case "lp_descent":
            return LpDescent, dict(settings, p=config.p, eps=config.eps)
        case "adamw":
            return torch.optim.AdamW, adaptive
        case "adam":
            return torch.optim.Adam, adaptive
        case "sgd":
            return torch.optim.SGD, dict(settings, momentum=config.momentum, nesterov=config.momentum > 0)
        case "lion":
            from lion_pytorch import Lion

            return Lion, dict(settings, betas=config.betas)


def schedule(step: int, name: str, *, warmup_steps: int, max_steps: int, min_lr_ratio: float) -> float:
    """The learning rate of update number `step` (from 0), as a share of the peak.

    A pure function of the update's number: nothing to save, and nothing that a number of processes could step
    too often.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    match name:
        case "cosine":
            decay = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            decay = 1.0 - progress
        case _:
            return 1.0
    return min_lr_ratio + (1.0 - min_lr_ratio) * decay
