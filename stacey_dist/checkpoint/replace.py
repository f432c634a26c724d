"""Replace a directory with one that was filled under another name."""

import shutil
from pathlib import Path

from stacey_dist.files import sync_directory


def put_in_place(filled: Path, path: Path, replaced: Path) -> None:
    """Rename `filled` to `path`, and wait until that is on the disk. What is there now is deleted afterwards.

    Replacing takes two renames. A kill between them leaves the old directory under the name `replaced`, until
    `bring_back`. Raises OSError; then the old directory is at `path` again.
    """
    if path.exists():
        path.rename(replaced)
    try:
        filled.rename(path)
    except OSError:
        bring_back(replaced, path)
        raise
    sync_directory(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def bring_back(replaced: Path, path: Path) -> None:
    """Undo a replacement that was not completed; delete what a completed one has left."""
    if path.exists():
        shutil.rmtree(replaced, ignore_errors=True)
    elif replaced.exists():
        replaced.rename(path)
