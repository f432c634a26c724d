"""The STACEY optimizers. Needs torch only."""

import torch

from stacey_dist.optim.lp_descent import LpDescent
from stacey_dist.optim.stacey import Stacey

__all__ = ["LpDescent", "Stacey"]

# Where DeepSpeed looks up the "type" in its configuration.
torch.optim.LpDescent, torch.optim.Stacey = LpDescent, Stacey  # type: ignore[attr-defined]
