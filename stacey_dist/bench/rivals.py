"""The optimizers that `stacey-dist bench` compares."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from stacey_dist.optim import Stacey
from stacey_dist.optim.rounding import STATES, Store, round_key
from stacey_dist.optim.rule import stacey_update

PEER = "torch AdamW, fused"
SETTINGS = dict(lr=1e-2, alpha=1e-2, tau=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
VARIANTS = (("p2", 2.8), ("p2", 3.0), ("pp", 2.8), ("2p", 2.8), ("p2", 30.0), ("pp", 30.0))


@dataclass(frozen=True)
class Rival:
    """An optimizer that is measured."""

    bytes_per_element: int
    make: Callable[[list[Parameter]], Callable[[], object]]
    """The function that makes a step, for parameters that have their gradients."""


def rivals(slow: bool) -> dict[str, Rival]:
    """Return what is measured, by name; `slow` with the plain rule."""

    def stacey(variant: str, p: float, compiled: bool = False, **changes: Any) -> Rival:
        def make(params: list[Parameter]) -> Callable[[], object]:
            optimizer = Stacey(params, p=p, variant=variant, **SETTINGS, **changes)  # type: ignore[arg-type]
            return Compiled(optimizer).step if compiled else optimizer.step

        return Rival(20, make)

    def other(module: str, class_name: str) -> Callable[[list[Parameter]], Callable[[], object]]:
        return lambda params: getattr(importlib.import_module(module), class_name)(params, lr=1e-4).step

    found = {PEER: Rival(28, lambda params: torch.optim.AdamW(params, fused=True).step)}
    for variant, p in VARIANTS:
        name = f"Stacey {variant}, p = {p:g}"
        found[f"{name}, kernel"] = stacey(variant, p, fused=True)
        if slow:
            found[f"{name}, plain rule"] = stacey(variant, p, fused=False)
            found[f"{name}, plain rule compiled"] = stacey(variant, p, compiled=True, fused=False)
    found["torch AdamW, foreach"] = Rival(28, lambda params: torch.optim.AdamW(params, foreach=True).step)
    found["torch SGD, momentum, foreach"] = Rival(20, lambda params: torch.optim.SGD(params, 1e-3, momentum=0.9).step)
    found["lion-pytorch"] = Rival(20, other("lion_pytorch", "Lion"))
    found["torch-optimi StableAdamW"] = Rival(28, other("optimi", "StableAdamW"))
    found["torchao AdamW8bit"] = Rival(16, other("torchao.optim", "AdamW8bit"))
    found["bitsandbytes AdamW8bit"] = Rival(16, other("bitsandbytes.optim", "AdamW8bit"))
    return found


class Compiled:
    """The plain rule by `torch.compile`, on the parameters of a Stacey that has made its states."""

    def __init__(self, optimizer: Stacey) -> None:
        optimizer.step()
        group = optimizer.param_groups[0]
        settings = optimizer._settings(group, torch.float32)
        store = Store("stochastic", 0, 1)

        def update(weight: Tensor, gradient: Tensor, z: Tensor, m: Tensor, key: Tensor) -> None:
            new, z_new, m_new = stacey_update(weight, gradient, z.float(), m.float(), settings)
            store.states_key = key  # type: ignore[assignment]  # a number would compile each step anew
            store.states(z, m, z_new, m_new)
            weight.copy_(new)

        self.update = torch.compile(update, dynamic=len(group["params"]) > 1)
        self.parts = [(p, p.grad, optimizer.state[p]["z"], optimizer.state[p]["m"]) for p in group["params"]]
        self.count = 0

    @torch.no_grad()
    def step(self) -> None:
        """Make one update."""
        self.count += 1
        weight = self.parts[0][0]
        key = torch.tensor(round_key(0, self.count, STATES), dtype=torch.int32, device=weight.device)
        for part in self.parts:
            self.update(*part, key)
