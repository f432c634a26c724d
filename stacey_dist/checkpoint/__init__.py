"""Checkpoints: complete or invisible, verified before they are believed, on any engine, never a pickle."""

from stacey_dist.checkpoint.background import BackgroundSaver
from stacey_dist.checkpoint.manifest import DamagedCheckpointError, find_checkpoints, verify
from stacey_dist.checkpoint.read import load_checkpoint, read_tensors
from stacey_dist.checkpoint.retention import retain
from stacey_dist.checkpoint.write import save_checkpoint

__all__ = [
    "BackgroundSaver",
    "DamagedCheckpointError",
    "find_checkpoints",
    "load_checkpoint",
    "read_tensors",
    "retain",
    "save_checkpoint",
    "verify",
]
