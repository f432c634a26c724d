"""Where each element of the model lives: one view of every engine's way to shard, for checkpoints and comparisons."""

from stacey_dist.sharding.engines import base_optimizer, fragments, refresh_weights, state_bytes
from stacey_dist.sharding.fragment import Fragment

__all__ = ["Fragment", "base_optimizer", "fragments", "refresh_weights", "state_bytes"]
