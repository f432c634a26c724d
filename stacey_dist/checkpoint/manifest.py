"""The manifest, which makes a directory a checkpoint.

    step_00000150/
      shard-00001-….safetensors   what rank 0 wrote: ranges of flattened tensors, as torch.distributed.checkpoint's
                                  safetensors storage has them; one such file for each rank that wrote something
      manifest.json               written last: format, tensors, versions, what the program added (position, settings),
                                  whether trainable weights and optimizer states are finite, each file's size and
                                  SHA-256, its own SHA-256

Tensors are model/NAME (weights, or their fp32 masters if there are any; buffers) and optimizer/NAME/KEY (z, m, step,
...). The directory is filled under a temporary name and then renamed. If it has its final name, every file in it was
written and synced.
"""

import errno
import hashlib
import json
import os
import re
import reprlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from stacey_dist.checkpoint.schema import check_manifest
from stacey_dist.errors import SettingsError, first_line
from stacey_dist.files import open_regular, parse_json, read_json, replace_file
from stacey_dist.version import __version__

T = TypeVar("T")

FORMAT = 2
MANIFEST = "manifest.json"

# A network file system that fails for a moment must not cost a run its newest checkpoint.
_READINGS = 5
_READ_AGAIN_SECONDS = 2.0
_BLOCK_BYTES = 1 << 20

_NAME = re.compile(r"step_(\d+)")


class DamagedCheckpointError(Exception):
    """A checkpoint that must not be used; the message names the broken file and what is wrong with it."""


class UnknownFormatError(DamagedCheckpointError):
    """A checkpoint of another format: it is not damaged, but this version can't read it."""


def directory_name(step: int) -> str:
    """Return the name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the number of updates in a checkpoint's name. Raises ValueError if the name is not a checkpoint's."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named as a checkpoint, like step_00000100")
    return int(match[1])


def find_checkpoints(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints under `directory` by their names, newest (most updates) first; none is opened.

    Raises OSError if the directory may not be read, and SettingsError if it is a file or a link that leads nowhere: a
    run must not take these for a directory without checkpoints.
    """
    directory = Path(directory)
    if not os.path.lexists(directory):
        return []
    if not directory.is_dir():
        raise SettingsError(f"{directory} is not a directory, or is a link to one that is not there")
    return sorted((p for p in directory.iterdir() if _NAME.fullmatch(p.name)), key=step_of, reverse=True)


def as_read(extra: dict[str, Any] | None) -> dict[str, Any]:
    """Return a copy of what a program adds, as it will be read again: the program may change its own meanwhile.

    Raises SettingsError if JSON can't hold it, or it could not be read again.
    """
    try:
        copy = parse_json(json.dumps(extra or {}))
    except (TypeError, ValueError, RecursionError) as error:
        raise SettingsError(f"extra can't be saved: {first_line(error)}") from error
    if type(copy) is not dict:
        raise SettingsError(f"extra can't be saved: it is a {type(extra).__name__}, not a dictionary")
    return copy


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with its checksum; wait until everything in the directory is on the disk.

    Raises ValueError if it could not be read again, because of what a program has added.
    """
    manifest = parse_json(json.dumps(manifest))
    check_manifest(manifest)
    text = json.dumps(manifest | {"sha256": digest(manifest)}, sort_keys=True)
    replace_file(directory / MANIFEST, text.encode())


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of the checkpoint at `path`, with every entry as the format has it.

    Raises:
        UnknownFormatError: another version wrote it.
        DamagedCheckpointError: it cannot be read, or is not as the format has it.
    """
    file = path / MANIFEST
    try:
        manifest = _persistently(read_json, file)
        version = manifest["format"]
        if type(version) is not int:
            raise ValueError(f"its format is {reprlib.repr(version)}")
        if version != FORMAT:
            raise UnknownFormatError(
                f"{file}: format {version}, but this version of stacey_dist ({__version__}) reads format {FORMAT}"
            )
        if manifest.get("sha256") != digest(manifest):
            raise DamagedCheckpointError(f"{file}: its content does not match its checksum")
        check_manifest(manifest)
    except ValueError as error:
        raise DamagedCheckpointError(f"{file}: {error}") from error
    except (OSError, TypeError, KeyError) as error:
        raise DamagedCheckpointError(f"{file}: {type(error).__name__}: {error}") from error
    return manifest


def says_finite(manifest: dict[str, Any]) -> bool | None:
    """Return whether all trainable weights and optimizer states of a checkpoint are finite; None if that is not known.

    It is not known of checkpoints that an earlier version wrote, or that were imported.
    """
    finite = manifest.get("finite")
    return finite if isinstance(finite, bool) else None


def digest(manifest: dict[str, Any]) -> str:
    """Return the SHA-256 of a manifest without its own entry `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Compare every file of the checkpoint at `path` with the manifest; return the manifest.

    Raises DamagedCheckpointError naming the first file that is missing, cut short or altered.
    """
    path = Path(path)
    manifest = read_manifest(path)
    verify_files(path, manifest, manifest["files"])
    verify_listing(path, manifest)
    return manifest


def verify_files(path: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """Raise DamagedCheckpointError unless these files of the checkpoint at `path` are as they were written."""
    for name in names:
        try:
            _persistently(_verify_file, path / name, manifest["files"][name])
        except OSError as error:
            raise DamagedCheckpointError(f"{path / name}: {error}") from error


def _verify_file(file: Path, expected: dict[str, Any]) -> None:
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
    if size != expected["bytes"]:
        raise DamagedCheckpointError(f"{file}: {size} bytes instead of {expected['bytes']}")
    if sha256(file) != expected["sha256"]:
        raise DamagedCheckpointError(f"{file}: its content does not match its checksum")


def _may_pass(error: OSError) -> bool:
    """Return whether another attempt to read may succeed: the disk or a limit was at fault, not the file."""
    return error.errno not in (errno.ENOENT, errno.EINVAL, errno.ENXIO, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def _persistently(read: Callable[..., T], *arguments: Any) -> T:
    """Return what `read` returns; call it again where a file system fails, up to five times in all."""
    for _ in range(_READINGS - 1):
        try:
            return read(*arguments)
        except OSError as error:
            if not _may_pass(error):
                raise
            time.sleep(_READ_AGAIN_SECONDS)
    return read(*arguments)


def verify_listing(path: Path, manifest: dict[str, Any]) -> None:
    """Raise DamagedCheckpointError if there is an extra file that torch's reader would take for a part."""
    for file in sorted(path.glob("*.safetensors")):
        if file.name not in manifest["files"]:
            raise DamagedCheckpointError(f"{file}: it does not belong to this checkpoint")


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(file) as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()
