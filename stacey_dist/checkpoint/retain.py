"""Deleting old checkpoints, after a new one is complete."""

import shutil
from pathlib import Path

from stacey_dist.checkpoint.manifest import find_checkpoints, step_of


def retain(saved: Path, keep_last: int, keep_every: int | None = None, best: int | None = None) -> None:
    """Delete checkpoints older than `saved` from its directory. One process calls it.

    Args:
        saved: the checkpoint that has just been completed.
        keep_last: how many stay, with `saved`. Directories of later steps, which resuming passed over, neither
            count nor go.
        keep_every: those whose number of updates is a multiple of it stay for good.
        best: the one after this many updates stays too.
    """
    older = [path for path in find_checkpoints(saved.parent) if step_of(path) <= step_of(saved)]
    for path in older[keep_last:]:
        if step_of(path) == best or (keep_every is not None and step_of(path) % keep_every == 0):
            continue
        # Out of sight first: a deletion cut short must not leave something that looks like a checkpoint.
        hidden = path.with_name(f".{path.name}.tmp")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
