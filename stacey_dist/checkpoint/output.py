"""Directories that a command writes whole: filled beside the old one, and then put in its place.

A directory that somebody else filled is never written to. One that an export filled has a file that lists all of its
files.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stacey_dist.errors import SettingsError
from stacey_dist.files import read_json

MARKER = "stacey_export.json"
# What exports of 0.1.0 wrote, which had no such list.
_UNLISTED = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|preprocessor_config|vocab"
    r"|model\.safetensors\.index)\.json|model(-\d+-of-\d+)?\.safetensors|[a-z]+\.model|merges\.txt|vocab\.txt|README\.txt"
    r"|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)
# Files that are replaced as a whole: of an older export with more of them none may stay.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_INSIDE = ".export-tmp"


def check_output(directory: Path, *, unlisted: bool = False) -> None:
    """Raise SettingsError unless `directory` is new, empty, or holds what an export wrote and nothing else.

    Args:
        directory: where an export is to be.
        unlisted: whether files that are named as those of an export count as such without a list of them.
    """
    if directory.is_symlink():
        raise SettingsError(f"{directory} is a symbolic link; name the directory itself")
    if directory.exists() and not directory.is_dir():
        raise SettingsError(f"{directory} is no directory")
    if not directory.exists():
        return
    listed = _listed(directory)
    for name, is_file in _entries(directory):
        if not is_file or not (name in listed or (unlisted and _UNLISTED.fullmatch(name))):
            raise SettingsError(f"{directory} holds {name}, which no export wrote; name a new or an empty directory")


def _entries(directory: Path) -> Iterator[tuple[str, bool]]:
    """The entries of a directory and of those in it, and whether each is a file (a link is none)."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name == _INSIDE:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from ((f"{entry.name}/{name}", is_file) for name, is_file in _entries(Path(entry.path)))
        else:
            yield entry.name, entry.is_file(follow_symlinks=False)


@contextmanager
def output_directory(directory: Path, *, unlisted: bool = False) -> Iterator[Path]:
    """Give a new directory to fill, and put it in the place of `directory` when that is done without an error.

    A failure or a kill leaves `directory` as it was. Between two renames it can be missing, if it held an export
    before; the next export to it brings that one back before it begins. What an older export has beside the weights, as
    a tokenizer, stays unless it is written anew.

    Raises:
        SettingsError: `directory` is not new, empty, or of an export (see `check_output`).
        OSError: it cannot be written.
    """
    replaced = directory.with_name(f".{directory.name}.export-replaced")
    if replaced.is_dir() and not replaced.is_symlink() and not directory.exists():
        replaced.rename(directory)
    check_output(directory, unlisted=unlisted)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A mount point, as in a container, cannot be renamed; it is filled from within.
    inside = os.path.ismount(directory) or (directory.exists() and not os.access(directory.parent, os.W_OK))
    temporary = directory / _INSIDE if inside else directory.with_name(f".{directory.name}.export-tmp")
    _remove(temporary)
    temporary.mkdir()
    try:
        yield temporary
        check_output(directory, unlisted=unlisted)
        _keep(directory, temporary)
        _list(temporary, [name for name, _ in _entries(temporary)])
        if inside:
            _move_in(temporary, directory)
        elif not directory.exists() or not os.listdir(directory):
            if directory.exists():
                shutil.copymode(directory, temporary)
            temporary.rename(directory)
        else:
            shutil.copymode(directory, temporary)
            _remove(replaced)
            directory.rename(replaced)
            temporary.rename(directory)
            _remove(replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _keep(old: Path, new: Path) -> None:
    """Copy what an older export has and a new one does not write, but for weights."""
    for name, _ in _entries(old) if old.exists() else ():
        if not _WEIGHTS.fullmatch(name) and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(old / name, new / name, follow_symlinks=False)


def _move_in(temporary: Path, directory: Path) -> None:
    """Put the files in a directory in the place of those of an older export in it."""
    _list(directory, [name for place in (temporary, directory) for name, _ in _entries(place)])
    new, old = set(os.listdir(temporary)), set(os.listdir(directory)) - {_INSIDE}
    for name in sorted((new | old) - {MARKER}):
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        if name in new:
            os.replace(temporary / name, directory / name)
        elif name in old:
            (directory / name).unlink(missing_ok=True)
    os.replace(temporary / MARKER, directory / MARKER)
    temporary.rmdir()


def _list(directory: Path, names: Any) -> None:
    """Write which files are of an export; never through a link or into a file that is there."""
    new = directory / f"{MARKER}.tmp"
    new.unlink(missing_ok=True)
    new.write_text(json.dumps({"files": sorted({*names, MARKER, new.name})}, indent=1) + "\n")
    os.replace(new, directory / MARKER)


def _listed(directory: Path) -> set[str]:
    """Return which files are of an export; none if it is not said."""
    try:
        names = read_json(directory / MARKER)["files"]
        return {name for name in names if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def _remove(directory: Path) -> None:
    """Remove what a killed export left. Raises OSError if it is something else."""
    if os.path.lexists(directory):
        shutil.rmtree(directory)
