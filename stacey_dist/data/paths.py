"""Paths and patterns: a path that exists is taken literally, a pattern is expanded here."""

import contextlib
import glob
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from stacey_dist.data.text import ENDINGS
from stacey_dist.errors import InputError

# All but what `datasets`, and fsspec below it, certainly take for a name. They know patterns, chains of file systems,
# home directories and variables.
_SPECIAL = re.compile(r"[^\w./ ,+@=-]")


def expand_files(argument: str, patterns: Sequence[str]) -> list[str]:
    """Return the text files that paths and glob patterns name, each pattern's matches sorted, each file once.

    A file that has several names, through links, has the first of them.

    A path that exists is that file, whatever characters it has. In a pattern, the folders at its beginning that exist
    are taken literally too: ``run[1]/*.jsonl`` names the files of a folder ``run[1]`` where there is one.

    Args:
        argument: the name of the argument that the patterns come from, for messages.
        patterns: paths or patterns; ``**`` matches any directories, ``~`` is the home directory.

    Raises:
        InputError: there are no patterns, one matches nothing, or a match is not a file with text in a known format.
    """
    if not patterns:
        raise InputError(f"{argument}: no files were given")
    files: dict[str, str] = {}
    for pattern in patterns:
        matches = _matches(pattern)
        if not matches:
            raise InputError(f"{argument}: {pattern!r} matches no file")
        for file in matches:
            _check_file(argument, file)
            files.setdefault(os.path.realpath(file), file)
    return list(files.values())


def _matches(pattern: str) -> list[str]:
    for path in (pattern, os.path.expanduser(pattern)):
        if os.path.lexists(path):
            return [path]
    if not os.path.lexists(pattern.split(os.sep)[0]):
        pattern = os.path.expanduser(pattern)
    folders = pattern.split(os.sep)
    existing = next((n for n in range(len(folders), 0, -1) if os.path.isdir(os.sep.join(folders[:n]) or os.sep)), 0)
    escaped = [glob.escape(folder) for folder in folders[:existing]]
    return sorted(glob.glob(os.sep.join([*escaped, *folders[existing:]]), recursive=True))


def _check_file(argument: str, file: str) -> None:
    if os.path.isdir(file):
        raise InputError(f"{argument}: {file} is a directory; to take its files, write {file}/*.json.gz")
    if not Path(file).name.endswith(ENDINGS):
        raise InputError(f"{argument}: {file} has none of the endings that can be read: {', '.join(ENDINGS)}")
    if not os.path.exists(file):
        raise InputError(f"{argument}: {file} is a link to a file that is not there")
    if not os.path.isfile(file):
        raise InputError(f"{argument}: {file} is not a regular file")
    if os.path.getsize(file) == 0:
        raise InputError(f"{argument}: {file} is empty (0 bytes)")


@contextlib.contextmanager
def literal_directory(directory: str) -> Iterator[str]:
    """Give a path of a local data set that ``datasets`` reads as that directory and no other.

    ``datasets`` takes a directory's own name for a pattern: for ``run[1]`` it reads ``run1``. For a name with such
    characters this is a temporary directory of links to the files.

    Raises:
        InputError: the directory for temporary files has such a name itself.
    """
    path = os.path.realpath(directory)
    if not _SPECIAL.search(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="stacey_dist-") as temporary:
        links = os.path.realpath(temporary)
        if _SPECIAL.search(links):
            raise InputError(
                f"dataset: {directory} has characters that the datasets library takes for a pattern, and so has "
                f"the directory for temporary files, {links}; set TMPDIR to another, or rename it"
            )
        for place, _, names in os.walk(path):
            inside = os.path.join(links, os.path.relpath(place, path))
            os.makedirs(inside, exist_ok=True)
            for name in names:
                os.symlink(os.path.join(place, name), os.path.join(inside, name))
        yield links
