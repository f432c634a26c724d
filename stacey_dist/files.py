"""Read files that others have made, with clear errors and without waiting for pipes; replace files atomically."""

import contextlib
import errno
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_LARGEST_JSON = 1 << 30
# What file systems answer that cannot sync a directory, as some of networks and some in user space.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)
# Python's own parser and writers of JSON call themselves for each level.
_DEEPEST_JSON = 100


def open_regular(path: Path, *, follow_links: bool = True) -> io.BufferedReader:
    """Open a regular file for reading. A pipe or a device is refused at once and not waited for.

    Args:
        path: the file.
        follow_links: whether `path` may be a symbolic link to a regular file.

    Raises:
        OSError: `path` is no regular file, or cannot be read; the message names it.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        descriptor = os.open(path, flags if follow_links else flags | os.O_NOFOLLOW)
    except ValueError as error:  # a null byte in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise OSError(errno.ELOOP, "it is a symbolic link, where a regular file belongs", str(path)) from error
        if error.errno == errno.ENXIO:
            raise OSError(errno.ENXIO, "it is a socket or a device, where a regular file belongs", str(path)) from error
        raise
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something')}, where a regular file belongs", str(path))
    return open(descriptor, "rb")


def check_regular(path: Path) -> None:
    """Raise OSError unless `path` is a regular file, for libraries that open files by their names."""
    open_regular(path).close()


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        OSError: it is no regular file, or cannot be read.
        ValueError: its content is not JSON, names a key twice in one object, is nested deeper than 100 levels, or is
            larger than 1 GiB.
    """
    with open_regular(path) as opened:
        # Asked for so many bytes, `read` would allocate them all.
        if os.fstat(opened.fileno()).st_size > _LARGEST_JSON:
            raise ValueError(f"it is larger than {_LARGEST_JSON} bytes")
        try:
            return parse_json(opened.read())
        except MemoryError as error:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from error


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError as `read_json` does."""
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError(f"it is nested deeper than {_DEEPEST_JSON} levels") from error
    if _is_deep(value):
        raise ValueError(f"it is nested deeper than {_DEEPEST_JSON} levels")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, as `replace_file` does."""
    replace_file(path, json.dumps(value, indent=1, sort_keys=True).encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file as `replacing` does."""
    with replacing(path) as file:
        file.write(content)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file that takes the place of `path` at the end; after an error, nothing has changed.

    At any instant, a loss of power included, the whole old or the whole new file is there.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Wait until a directory's entries are on the disk, where the file system has a call for that."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(descriptor)


def with_name(path: str | os.PathLike[str]) -> Path:
    """Return a path that ends in a name, as a sibling's name is made of it: `.` and `..` are resolved."""
    path = Path(path)
    return path if path.name not in ("", "..") else path.resolve()


def printable(text: object) -> str:
    """Return text of others in one line that every terminal shows as it is: control characters are spelled."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        [(repeated, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated[:100]!r} is there twice")
    return found


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_DEEPEST_JSON):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True
