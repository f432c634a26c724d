"""Checkpoints for any engine: written atomically, verified before they are loaded, without pickles.

The modules, in the order in which a weight passes through them into a file and back:

    write.py       save_checkpoint: snapshot, then each rank's file, the manifest, and one rename (replace.py)
    snapshot.py    this rank's share of weights and states, copied to host memory
    shard.py       one rank's file, hashed as it is written; ranges out of such files
    shares.py      what the ranks tell rank 0 about their files
    manifest.py    what makes the directory a checkpoint; schema.py checks every entry of it
    read.py        load_checkpoint: verify, allocate, read, restore
    restore.py     tensors of this rank that are read into, and what completes them

The others: background.py saves in the background, retention.py deletes old checkpoints, replicas.py compares ranks that
hold the same elements, collectives.py raises an error of one rank on all ranks, compare.py compares two checkpoints,
and importers/ reads checkpoints of other libraries.
"""

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
