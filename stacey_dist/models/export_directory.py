"""Write the directory of an export whole: fill it beside the old one, and then put it in its place.

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

from stacey_dist.checkpoint.replace import bring_back, put_in_place
from stacey_dist.errors import SettingsError
from stacey_dist.files import read_json, with_name

MARKER = "stacey_export.json"
# The files of exports of 0.1.0, which had no such list.
_UNLISTED = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|preprocessor_config|vocab"
    r"|model\.safetensors\.index)\.json|model(-\d+-of-\d+)?\.safetensors|[a-z]+\.model|merges\.txt|vocab\.txt|README\.txt"
    r"|chat_template\.jinja|additional_chat_templates/[^/]+\.jinja"
)
# Files that are replaced together: none of an older export may stay, if that had more of them.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_INSIDE = ".export-tmp"
# No model loads without it.
_CONFIG = "config.json"


def check_output(directory: Path, *, unlisted: bool = False) -> None:
    """Raise SettingsError unless `directory` is new, empty, or holds what an export wrote and nothing else.

    Args:
        directory: where an export is to be.
        unlisted: accept files that no list names if they are named as an export's: 0.1.0 wrote no list.
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
    """Yield the entries of a directory and of those in it, and whether each is a file (a link is none)."""
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name == _INSIDE:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from ((f"{entry.name}/{name}", is_file) for name, is_file in _entries(Path(entry.path)))
        else:
            yield entry.name, entry.is_file(follow_symlinks=False)


@contextmanager
def output_directory(directory: Path, *, unlisted: bool = False) -> Iterator[Path]:
    """Yield a new directory to fill, and put it in the place of `directory` if that is done without an error.

    A failure or a kill leaves `directory` as it was. A kill between two renames can leave it missing, if it held an
    export before; the next export to it brings that one back before it begins. A mount point, the working directory,
    and a directory in one that can't be written are not renamed: there the files are moved one after another, and a
    failure or a kill meanwhile leaves no config.json, without which no mixture of two exports loads. What an older
    export has beside the weights, as a tokenizer, stays unless it is written again.

    Raises:
        SettingsError: `directory` is not new, empty, or of an export (see `check_output`).
        OSError: it cannot be written.
    """
    directory = with_name(directory)
    replaced = directory.with_name(f".{directory.name}.export-replaced")
    bring_back(replaced, directory)
    check_output(directory, unlisted=unlisted)
    directory.parent.mkdir(parents=True, exist_ok=True)
    # A mount point, as in a container, cannot be renamed; it is filled from within. A shell would stay in the old one.
    inside = os.path.ismount(directory) or (
        directory.exists() and (directory.samefile(".") or not os.access(directory.parent, os.W_OK))
    )
    temporary = directory / _INSIDE if inside else directory.with_name(f".{directory.name}.export-tmp")
    if os.path.lexists(temporary):  # left by a killed export
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
        check_output(directory, unlisted=unlisted)
        copy_others(directory, temporary)
        _list(temporary, [name for name, _ in _entries(temporary)])
        if inside:
            _move_in(temporary, directory)
        else:
            if directory.exists():
                shutil.copymode(directory, temporary)
            put_in_place(temporary, directory, replaced)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def copy_others(old: Path, new: Path) -> None:
    """Copy the files of an older export that a new one does not write, except weights. Links are left out."""
    for name, is_file in _entries(old) if old.is_dir() else ():
        if is_file and not _WEIGHTS.fullmatch(name) and not (new / name).exists():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(old / name, new / name, follow_symlinks=False)


def _move_in(temporary: Path, directory: Path) -> None:
    """Move new files from a directory inside `directory` to the place of the older ones."""
    _list(directory, [name for place in (temporary, directory) for name, _ in _entries(place)])
    new, old = set(os.listdir(temporary)), set(os.listdir(directory)) - {_INSIDE}
    (directory / _CONFIG).unlink(missing_ok=True)
    for name in sorted((new | old) - {MARKER}, key=lambda name: (name == _CONFIG, name)):
        if (directory / name).is_dir():
            shutil.rmtree(directory / name)
        if name in new:
            os.replace(temporary / name, directory / name)
        else:
            (directory / name).unlink(missing_ok=True)
    os.replace(temporary / MARKER, directory / MARKER)
    temporary.rmdir()


def _list(directory: Path, names: Any) -> None:
    """Write the list of an export's files; never through a link or into a file that is there."""
    new = directory / f"{MARKER}.tmp"
    new.unlink(missing_ok=True)
    new.write_text(json.dumps({"files": sorted({*names, MARKER, new.name})}, indent=1) + "\n")
    os.replace(new, directory / MARKER)


def _listed(directory: Path) -> set[str]:
    """Return the files that the list of an export names; none if there is no list."""
    try:
        names = read_json(directory / MARKER)["files"]
        return {name for name in names if isinstance(name, str)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
