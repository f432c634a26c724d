"""One optimizer of torch's Muon, for the matrices of hidden layers, and torch's AdamW, for the other parameters."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from stacey_dist.errors import SettingsError


def hidden_matrices(model: nn.Module) -> set[nn.Parameter]:
    """Return the trainable parameters that are matrices, without those of embeddings and of the output head.

    The head is what transformers' `get_output_embeddings` gives; another module's last layer is a hidden one.
    """
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    excluded = {param for module in ends for param in module.parameters()}
    return {param for param in model.parameters() if param.requires_grad and param.dim() == 2} - excluded


class MuonWithAdamW(Optimizer):
    """Update matrices by `torch.optim.Muon` and all other parameters by fused `torch.optim.AdamW`.

    Experts that a model keeps in one tensor of three dimensions are no matrices: AdamW updates them.

    A step of Muon has the size of AdamW's (`adjust_lr_fn="match_rms_adamw"`, https://arxiv.org/abs/2502.16982, 2.2).
    `param_groups` and `state` are those of both. A group that has `ns_steps` is Muon's.

    Args:
        params: Parameter groups; every parameter of one with `muon` true is updated by Muon.
        lr: The learning rate of Muon.
        adamw_lr: The learning rate of AdamW.
        momentum: Muon's momentum.
        betas: AdamW's.
        eps: AdamW's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        adamw_lr: float,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        matrices: list[dict[str, Any]] = []
        others: list[dict[str, Any]] = []
        for group in params:
            settings = {name: value for name, value in group.items() if name != "muon"}
            (matrices if group["muon"] else others).append(settings)
        if not matrices:
            raise SettingsError("optimizer.name: muon needs hidden matrices, and the model has none; take adamw")
        self._muon = torch.optim.Muon(matrices, lr=lr, momentum=momentum, adjust_lr_fn="match_rms_adamw")
        # A model may have nothing but matrices; torch refuses an optimizer without groups.
        self._adamw = AdamW(others or [{"params": []}], lr=adamw_lr, betas=betas, eps=eps, fused=True)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        for group in self.param_groups:
            group["adamw_lr"] = adamw_lr

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one update; returns what `closure`, if there is one, returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "ns_steps" not in group:
                group["lr"] = group["adamw_lr"]
        # A loaded state, and an engine, put other groups and states in the place of those that both were made with.
        self._muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        self._adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]
        for part in (self._muon, self._adamw):
            part.state = self.state
            part.step()
        return loss
