"""Build the optimizer of a configuration, with parameter groups with and without weight decay."""

import inspect
import math
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from stacey_dist.errors import SettingsError
from stacey_dist.optim import LpDescent, Stacey
from stacey_dist.training.muon import MuonWithAdamW, hidden_matrices
from stacey_dist.training.settings.config import OptimizerConfig, RunConfig, ScheduleConfig

# Optimizers that some engines cannot run, and the engines that can: Muon needs whole matrices, which FSDP2's DTensors
# gather, and AdEMAMix one count of updates for all parameters.
_ENGINES = {"muon": ("single", "ddp", "fsdp2"), "ademamix": ("single", "ddp")}


def check_engine(name: str, engine: str) -> None:
    """Raise SettingsError if an engine cannot run an optimizer, or this torch does not have it."""
    engines = _ENGINES.get(name, (engine,))
    if engine not in engines:
        raise SettingsError(f"optimizer.name: {name} is not supported with {engine}; use {', '.join(engines)}")
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise SettingsError(f"optimizer.name: muon needs torch >= 2.9, and this is {torch.__version__}")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: decayed, and (norms and biases, by default) not decayed.

    For muon there are two more, of the matrices that it updates; `muon` says which groups they are.
    """
    matrices = hidden_matrices(model) if config.name == "muon" else set()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for param in model.parameters():  # lists a tied parameter once
        if param.requires_grad:
            decayed = param.dim() >= 2 or config.decay_norms_and_biases
            groups.setdefault((param in matrices, decayed), []).append(param)
    made = []
    for (by_muon, decayed), params in sorted(groups.items(), reverse=True):
        own = {"muon": by_muon} if config.name == "muon" else {}
        made.append({"params": params, "weight_decay": config.weight_decay if decayed else 0.0, **own})
    return made


def build_optimizer(model: nn.Module, config: OptimizerConfig, seed: int, *, by_owner: bool = False) -> Optimizer:
    """Build the optimizer of `config` over the model's trainable parameters; `seed` is of stochastic rounding.

    With `by_owner`, torch's ZeroRedundancyOptimizer is around it: each parameter is updated by one process, which
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
    match config.name:
        case "stacey":
            accepted = inspect.signature(Stacey).parameters.keys() - {"weight_decay"}  # which is a group's
            own = {field.name: getattr(config, field.name) for field in fields(config) if field.name in accepted}
            return Stacey, settings | own | {"seed": seed}
        case "lp_descent":
            return LpDescent, dict(settings, p=config.p, eps=config.eps, rounding=config.rounding, seed=seed)
        case "adamw":
            return torch.optim.AdamW, dict(settings, betas=config.betas, eps=config.eps, fused=True)
        case "adam":
            return torch.optim.Adam, dict(settings, betas=config.betas, eps=config.eps, fused=True)
        case "muon":
            settings |= dict(adamw_lr=config.adamw_lr, momentum=config.momentum)
            return MuonWithAdamW, dict(settings, betas=config.betas, eps=config.eps)
        case "ademamix":
            from pytorch_optimizer import AdEMAMix

            settings |= dict(betas=(*config.betas, config.beta3), alpha=config.alpha, eps=config.eps)
            return AdEMAMix, dict(settings, weight_decouple=True, step=0)
        case "sgd":
            return torch.optim.SGD, dict(settings, momentum=config.momentum, nesterov=config.momentum > 0)
        case "lion":
            from lion_pytorch import Lion

            return Lion, dict(settings, betas=config.betas)


def scheduled(config: RunConfig, step: int, skipped: int = 0) -> dict[str, Any]:
    """Return those settings of update number `step` (from 0) that change over a run.

    A pure function of the update's number and of the number of skipped updates before it: there is no state to save.
    All but the learning rate are constant in the paper, and unless the settings say otherwise. alpha and tau are scaled
    here; `Stacey(lr_reference=...)` does the same for programs whose groups have different learning rates.
    """
    optimizer, schedule = config.optimizer, config.schedule
    max_steps = config.train.max_steps
    share, progress = lr_share(step, schedule, max_steps), min(1.0, step / max(1, max_steps - 1))
    settings: dict[str, Any] = {"lr": optimizer.lr * share}
    if optimizer.name == "muon" and optimizer.adamw_lr is not None:
        settings["adamw_lr"] = optimizer.adamw_lr * share
    if optimizer.name == "ademamix":  # alpha and beta3 grow over the run; the count of updates is the group's
        settings |= {"step": step - skipped, "t_alpha_beta3": max_steps}
    if optimizer.name == "stacey":
        if schedule.alpha == "lr":
            settings["alpha"] = optimizer.alpha * share
        if schedule.final_alpha is not None:
            settings["alpha"] = optimizer.alpha * (schedule.final_alpha / optimizer.alpha) ** progress
        if schedule.tau == "lr":
            settings["tau"] = optimizer.tau * share
        if optimizer.bias_correction:
            settings["betas"] = corrected_betas(optimizer.betas, step - skipped)  # m has seen so many gradients
    if optimizer.name in ("stacey", "lp_descent") and schedule.final_p is not None:
        # 1/(p - 1), the power that s takes of a gradient, from 1/(p_0 - 1) to 1/(p_T - 1) on a straight line
        first, last = 1.0 / (optimizer.p - 1.0), 1.0 / (schedule.final_p - 1.0)
        power = first + (last - first) * progress
        settings["p"] = math.inf if power == 0.0 else 1.0 + 1.0 / power
    return settings


def depends_on_skipped(config: RunConfig, applied: int) -> bool:
    """Return whether `scheduled` depends on the number of skipped updates, after `applied` updates that were not.

    Bias correction ends once 1 - beta2^t rounds to 1.
    """
    optimizer = config.optimizer
    if optimizer.name == "ademamix":
        return True
    return optimizer.name == "stacey" and optimizer.bias_correction and 1.0 - optimizer.betas[1] ** applied < 1.0


def corrected_betas(betas: tuple[float, float], step: int) -> tuple[float, float]:
    """Return the betas with which m and c of update number `step` (from 0) are weighted means of the gradients so far.

    With W_t = 1 - beta2^t, the sum of weights in a moving average of t gradients that began at 0,

        m_t / W_t = b2 m_(t-1) / W_(t-1) + (1 - b2) g_t,     b2 = beta2 W_(t-1) / W_t
        c_t / B_t = b1 m_(t-1) / W_(t-1) + (1 - b1) g_t,     b1 = beta1 W_(t-1) / B_t

    with B_t = beta1 W_(t-1) + 1 - beta1.
    """
    beta1, beta2 = betas
    weight, next_weight = 1.0 - beta2**step, 1.0 - beta2 ** (step + 1)
    return beta1 * weight / (beta1 * weight + 1.0 - beta1), beta2 * weight / next_weight


def lr_share(step: int, schedule: ScheduleConfig, max_steps: int) -> float:
    """Return the learning rate of update number `step` (from 0), as a share of the peak.

    After warm-up, with t from 0 to 1 over the decay, `min_lr_ratio` + (1 - `min_lr_ratio`) d, where d is

        (1 + cos(pi t)) / 2,     1 - t     or     1 - sqrt(t).
    """
    warmup, decay = schedule.warmup_updates(max_steps), schedule.decay_updates(max_steps)
    if step < warmup:
        return (step + 1) / warmup
    start = max_steps - decay if schedule.name == "wsd" else warmup
    t = min(1.0, max(0, step - start) / max(1, max_steps - start))
    match schedule.name:
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * t))
        case "wsd" if schedule.decay_shape == "1-sqrt":
            remaining = 1.0 - math.sqrt(t)
        case "linear" | "wsd":
            remaining = 1.0 - t
        case _:
            return 1.0
    return schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * remaining
