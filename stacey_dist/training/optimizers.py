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


def build_optimizer(model: nn.Module, config: OptimizerConfig, seed: int) -> Optimizer:
    """The optimizer of `config` over the model's trainable parameters; `seed` is of stacey's stochastic rounding."""
    groups = parameter_groups(model, config)
    lr, betas, eps = config.lr, config.betas, config.eps
    match config.name:
        case "stacey":
            return Stacey(
                groups,
                lr,
                p=config.p,
                variant=config.variant,
                alpha=config.alpha,
                tau=config.tau,
                betas=betas,
                eps=eps,
                z_init=config.z_init,
                state_dtype=config.state_dtype,
                rounding=config.rounding,
                seed=seed,
            )
        case "lp_descent":
            return LpDescent(groups, lr, p=config.p, eps=eps)
        case "adamw":
            return torch.optim.AdamW(groups, lr, betas=betas, eps=eps, fused=True)
        case "adam":
            return torch.optim.Adam(groups, lr, betas=betas, eps=eps, fused=True)
        case "sgd":
            return torch.optim.SGD(groups, lr, momentum=config.momentum, nesterov=config.momentum > 0)
        case "lion":
            from lion_pytorch import Lion

            lion: Optimizer = Lion(groups, lr, betas=betas)
            return lion


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set every group's learning rate for the next update."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


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
