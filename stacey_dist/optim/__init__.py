"""The STACEY optimizers. Needs torch only."""

from stacey_dist.optim.lp_descent import LpDescent
from stacey_dist.optim.registry import register
from stacey_dist.optim.stacey import Stacey

__all__ = ["LpDescent", "Stacey"]

register(Stacey, LpDescent)
