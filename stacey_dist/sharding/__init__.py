"""Find which process holds each element of the model, on every engine, for checkpoints and comparisons."""

from stacey_dist.sharding.engines import base_optimizer, fragments, refresh_weights, state_bytes
from stacey_dist.sharding.fragment import Fragment

__all__ = ["Fragment", "base_optimizer", "fragments", "refresh_weights", "state_bytes"]
