"""Stochastic lp descent, the paper's algorithm 1, as a torch optimizer."""

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from stacey_dist.optim.base import ChunkUpdate, ElementwiseOptimizer
from stacey_dist.optim.group_settings import rule_lr
from stacey_dist.optim.rounding import Store
from stacey_dist.optim.rule import lp_descent_update


class LpDescent(ElementwiseOptimizer):
    """Stochastic lp descent: theta' = theta - lr s(g) - lr weight_decay theta.

    p = 2 is SGD, p = infinity is signSGD. Algorithm 1 of the paper, with decoupled weight decay.

    Args:
        params: parameters or groups; every setting below may differ by group. float64 parameters are updated in
            float64, all others in float32.
        lr: eta, the step size; a number or a one-element tensor.
        p: the norm, >= 2, infinity allowed.
        eps: added to the denominator of s, outside the power.
        weight_decay: lambda, decoupled: multiplied by lr, acting on the old weight.
        rounding: ``"stochastic"`` or ``"nearest"``, for bfloat16 and float16 parameters.
        seed: an integer >= 0, part of the hash that makes the random bits of stochastic rounding.

    State of a parameter: ``step`` alone (int64 scalar on the CPU).

    Raises:
        ValueError: a setting is out of range, or a parameter is complex, an integer, or on MPS.
        RuntimeError: sparse gradients (in `step`).
    """

    _later_settings: ClassVar[dict[str, Any]] = {"rounding": "stochastic", "seed": 0}

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        *,
        p: float = 3.0,
        eps: float = 0.0,
        weight_decay: float = 0.0,
        rounding: str = "stochastic",
        seed: int = 0,
    ) -> None:
        settings = dict(lr=lr, p=p, eps=eps, weight_decay=weight_decay, rounding=rounding, seed=seed)
        super().__init__(params, settings)

    def _chunk_update(self, group: dict[str, Any], step: int, dtype: torch.dtype) -> ChunkUpdate:
        lr = rule_lr(group["lr"], dtype)
        p, eps, weight_decay = group["p"], group["eps"], group["weight_decay"]
        store = Store(group["rounding"], group["seed"], step)

        def update(weight: Tensor, gradient: Tensor) -> None:
            new = lp_descent_update(weight.to(dtype), gradient, lr=lr, p=p, eps=eps, weight_decay=weight_decay)
            store.weight(weight, new, gradient)

        return update
