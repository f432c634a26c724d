"""STACEY optimizers for large-scale training: sharded by any engine without changing one bit of the result."""

from stacey_dist.optim import LpDescent, Stacey
from stacey_dist.version import __version__

__all__ = ["LpDescent", "Stacey", "__version__"]
