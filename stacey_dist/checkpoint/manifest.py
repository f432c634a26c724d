"""What makes a directory a checkpoint.

    step_00000150/
      model.safetensors       parameters and buffers, by name
      optimizer.safetensors   NAME/KEY for each parameter NAME and state KEY (z, m, step, ...)
      manifest.json           written last: format, step, config, versions, each file's size and SHA-256, its own

The directory is filled under a temporary name and appears under its own by one rename: if it is there under that
name, every file in it was written and synced before.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"

_NAME = re.compile(r"step_(\d+)")


class DamagedCheckpointError(Exception):
    """A checkpoint that must not be used; the message names the broken file and what is wrong with it."""


def directory_name(step: int) -> str:
    """The name of the checkpoint after `step` updates."""
    return f"step_{step:08d}"


def find_checkpoints(directory: Path) -> list[Path]:
    """The checkpoints under `directory` by their names, newest (most updates) first; none is opened."""
    found = [(int(match[1]), path) for path in directory.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `path`. Raises DamagedCheckpointError."""
    file = path / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text())
        version = manifest["format"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DamagedCheckpointError(f"{file}: {type(error).__name__}: {error}") from error
    if version != FORMAT:
        raise DamagedCheckpointError(f"{file}: format {version}, but this version reads format {FORMAT}")
    if manifest.get("sha256") != digest(manifest):
        raise DamagedCheckpointError(f"{file}: its content does not match its checksum")
    return manifest


def digest(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest without its own entry `sha256`."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify(path: Path) -> dict[str, Any]:
    """Check every file of the checkpoint at `path` against the manifest; returns the manifest.

    Raises DamagedCheckpointError naming the first file that is missing, cut short or altered.
    """
    manifest = read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != expected["bytes"]:
                raise DamagedCheckpointError(f"{file}: {size} bytes instead of {expected['bytes']}")
            if sha256(file) != expected["sha256"]:
                raise DamagedCheckpointError(f"{file}: its content does not match its checksum")
        except OSError as error:
            raise DamagedCheckpointError(f"{file}: {error}") from error
    return manifest


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
