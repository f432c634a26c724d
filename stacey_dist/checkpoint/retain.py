"""Deleting old checkpoints, after a new one is complete."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from stacey_dist.checkpoint.manifest import (
    DamagedCheckpointError,
    find_checkpoints,
    read_manifest,
    says_finite,
    step_of,
)


def retain(saved: Path, keep_last: int, keep_every: int | None = None, best: int | None = None) -> None:
    """Delete checkpoints older than `saved` from its directory. One process calls it.

    The newest one whose weights and optimizer states are finite is never deleted.

    Args:
        saved: the checkpoint that has just been completed.
        keep_last: how many stay, with `saved`. Directories of later steps, which resuming passed over, neither
            count nor go.
        keep_every: those whose number of updates is a multiple of it stay for good.
        best: the one after this many updates stays too.
    """
    older = [path for path in find_checkpoints(saved.parent) if step_of(path) <= step_of(saved)]
    if len(older) <= keep_last:
        return
    usable = _newest_usable(older)
    for path in older[keep_last:]:
        kept_for_good = keep_every is not None and step_of(path) % keep_every == 0
        if path in usable or step_of(path) == best or kept_for_good:
            continue
        # Out of sight first: a deletion cut short must not leave something that looks like a checkpoint.
        hidden = path.with_name(f".{path.name}.tmp")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def newest_usable(directory: Path) -> Path | None:
    """Return the newest checkpoint under `directory` that a run can go on from; None if there is none.

    It is the newest one that is not known to hold weights or states that are not finite. Files are not verified.
    """
    return next((path for path in find_checkpoints(directory) if _finite(path) is not False), None)


def _newest_usable(checkpoints: Iterable[Path]) -> list[Path]:
    """The newest finite checkpoint, after the newest one of which it is not known if that is newer."""
    found: list[Path] = []
    for path in checkpoints:
        finite = _finite(path)
        if finite or (finite is None and not found):
            found.append(path)
        if finite:
            break
    return found


def _finite(path: Path) -> bool | None:
    """Whether a checkpoint's weights and states are finite; False too if its manifest is damaged."""
    try:
        return says_finite(read_manifest(path))
    except DamagedCheckpointError:
        return False
