"""Delete old checkpoints, after a new one is complete."""

import errno
import os
import shutil
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path

from stacey_dist.checkpoint.manifest import (
    DamagedCheckpointError,
    find_checkpoints,
    read_manifest,
    says_finite,
    step_of,
)
from stacey_dist.checkpoint.write import clear_leftovers


def retain(
    saved: str | os.PathLike[str], keep_last: int, keep_every: int | None = None, kept: Collection[int] = ()
) -> None:
    """Delete checkpoints older than `saved` from its directory, and what killed saves of older ones have left there.

    Only one process calls it. The newest checkpoint whose weights and optimizer states are finite is never deleted, nor
    are newer ones that can't be read now.

    Args:
        saved: the checkpoint that has just been completed, named by its updates as `step_00000100`.
        keep_last: how many to keep, with `saved`. Checkpoints of later steps, which resuming skipped, do not count
            and are not deleted.
        keep_every: keep those whose number of updates is a multiple of it.
        kept: numbers of updates whose checkpoints are kept.

    Raises:
        ValueError: `saved` is not named as a checkpoint.
        OSError: one cannot be deleted.
    """
    saved = Path(saved)
    clear_leftovers(saved.parent, before=step_of(saved))
    counted = [path for path in find_checkpoints(saved.parent) if step_of(path) <= step_of(saved)]
    if len(counted) <= keep_last:
        return
    needed = _fallbacks(counted)
    errors = []
    for path in counted[keep_last:]:
        kept_for_good = keep_every is not None and step_of(path) % keep_every == 0
        if path in needed or step_of(path) in kept or kept_for_good:
            continue
        try:
            _delete(path)
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _delete(path: Path) -> None:
    """Delete a checkpoint. Raises OSError if it cannot be deleted; a protected one keeps its name."""
    if path.is_symlink():
        path.unlink()
        return
    # Renamed first: a deletion that is cut short must not leave something that looks like a checkpoint.
    hidden = path.with_name(f".{path.name}.tmp")
    files = sorted(os.listdir(path))
    path.rename(hidden)
    try:
        shutil.rmtree(hidden)
    except OSError:
        if sorted(os.listdir(hidden)) == files:
            hidden.rename(path)
        raise


def newest_usable(directory: Path) -> Path | None:
    """Return the newest checkpoint under `directory` that a run can resume from; None if there is none.

    Checkpoints that are known to be non-finite, or whose manifest cannot be read, are skipped. Files are not verified.
    """
    for path in find_checkpoints(directory):
        with suppress(DamagedCheckpointError):
            if says_finite(read_manifest(path)) is not False:
                return path
    return None


def _fallbacks(checkpoints: Iterable[Path]) -> list[Path]:
    """Return the checkpoints that must never be deleted.

    They are the newest finite checkpoint and, among the newer ones, the newest whose finiteness is not known and all
    that cannot be read now.
    """
    found: list[Path] = []
    unreadable: list[Path] = []
    for path in checkpoints:
        try:
            finite = says_finite(read_manifest(path))
        except DamagedCheckpointError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and cause.errno not in (errno.ENOENT, errno.ENOTDIR):
                unreadable.append(path)
            continue
        if finite or (finite is None and not found):
            found.append(path)
        if finite:
            break
    return found + unreadable
