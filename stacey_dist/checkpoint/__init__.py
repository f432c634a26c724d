"""Checkpoints: complete or invisible, verified before they are believed, never a pickle."""

from stacey_dist.checkpoint.gather import Tensors, gather_tensors
from stacey_dist.checkpoint.manifest import DamagedCheckpointError, find_checkpoints, verify
from stacey_dist.checkpoint.read import load_checkpoint
from stacey_dist.checkpoint.write import keep_newest, save_checkpoint

__all__ = [
    "DamagedCheckpointError",
    "Tensors",
    "find_checkpoints",
    "gather_tensors",
    "keep_newest",
    "load_checkpoint",
    "save_checkpoint",
    "verify",
]
