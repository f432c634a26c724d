"""Write a checkpoint: each rank its own ranges, the manifest last, one rename."""

import os
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stacey_dist.checkpoint.collectives import rank, rank0_call, together, world_size
from stacey_dist.checkpoint.manifest import FORMAT, MANIFEST, as_read, write_manifest
from stacey_dist.checkpoint.replace import bring_back, put_in_place
from stacey_dist.checkpoint.replicas import compare_once
from stacey_dist.checkpoint.shard import shard_name, write_shard
from stacey_dist.checkpoint.shares import Share, collect, contents
from stacey_dist.checkpoint.snapshot import Snapshot, snapshot
from stacey_dist.errors import SettingsError
from stacey_dist.files import with_name
from stacey_dist.version import __version__

_VISIBLE_SECONDS = 60.0
_FILE = re.compile(rf"{re.escape(MANIFEST)}|shard-\d+-model-\d+-of-\d+\.safetensors")
_LEFTOVER = re.compile(r"\.(?P<name>step_(?P<step>\d+))\.tmp(?P<replaced>-replaced)?")


def save_checkpoint(
    path: str | os.PathLike[str], model: nn.Module, optimizer: Any, extra: dict[str, Any] | None = None
) -> Path:
    """Save weights, buffers and optimizer state as the directory `path`, from any engine; return `path`.

    All ranks call it together, with a path that all of them reach. Each writes what it holds; none gathers anything
    but frozen parameters, one after another.
    The directory gets its name when all its files are complete and synced. A checkpoint of that name, or an empty
    directory, is replaced by two renames. If the process is killed between them, nothing has the name until the next
    save there restores the old checkpoint; to avoid this, use a new name for each save.
    The manifest's entry `finite` says whether all trainable weights and optimizer states are finite. Buffers and frozen
    parameters do not count.

    Args:
        path: the checkpoint's directory.
        model: the model, or what its engine has made of it; parameters (a tied one once, under its first name) and
            persistent buffers are saved.
        optimizer: its optimizer, or what the engine has made of it.
        extra: anything JSON can hold; comes back from `load_checkpoint`.

    Raises:
        NotImplementedError: the model is split over the ranks in a way that is not supported; the message names it.
        SettingsError: `extra`, an optimizer's state or a dtype can't be saved; or there is something other than a
            checkpoint at `path`; or ranks that should hold replicas differ, which is checked in a model's first save.
        OSError: the files could not be written, on this rank or another. Nothing is left behind, and other
            checkpoints are as they were.
    """
    copied = together(lambda: as_read(extra))
    compare_once(model, optimizer)
    return write(with_name(path), snapshot(model, optimizer), copied)


def write(path: Path, copies: Snapshot, extra: dict[str, Any], group: Any = None) -> Path:
    """Write each rank's snapshot; the ranks talk over `group`. See `save_checkpoint`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        rank0_call(lambda: _begin(path, temporary), group)
        mine = together(lambda: _write_share(temporary, copies), group)
        shares = collect(mine, copies, group)
        rank0_call(lambda: finish(path, temporary, shares, extra), group)
    except BaseException:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def _begin(path: Path, temporary: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.path.lexists(path) and not _is_replaceable(path):
        raise SettingsError(f"{path}: is there already and is not a checkpoint; name a new directory")
    bring_back(_replaced(path), path)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()


def _is_replaceable(path: Path) -> bool:
    """Return whether there is a directory without other files than those of a checkpoint."""
    if path.is_symlink() or not path.is_dir():
        return False
    names = os.listdir(path)
    return all(map(_FILE.fullmatch, names)) and names != [MANIFEST]  # alone, it is another program's


def _write_share(temporary: Path, copies: Snapshot) -> Share:
    _wait_for(temporary)
    ranges = copies.ranges
    file, finite = write_shard(temporary / shard_name(rank()), ranges) if ranges else (None, None)
    return Share.of(copies, file, finite)


def finish(path: Path, temporary: Path, shares: list[Share], extra: dict[str, Any]) -> None:
    """Write the manifest of what the ranks have written, by rank, to `temporary`, and rename that to `path`."""
    files = {shard_name(writer): share.file for writer, share in enumerate(shares) if share.file is not None}
    _wait_for(temporary, files)
    manifest = {
        "format": FORMAT,
        "versions": {"stacey_dist": __version__, "torch": torch.__version__},
        "processes": world_size(),
        "tensors": contents(shares),
        "extra": extra,
        "files": files,
    }
    known_finite = [share.finite for share in shares if share.finite is not None]
    if known_finite:
        manifest["finite"] = all(known_finite)
    try:
        write_manifest(temporary, manifest)
    except ValueError as error:
        raise SettingsError(f"{path}: can't be saved, because it could not be loaded again: {error}") from error
    put_in_place(temporary, path, _replaced(path))


def _replaced(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-replaced")


def clear_leftovers(directory: Path, before: int | None = None) -> None:
    """Remove what killed saves left behind in a directory. No save may be running there.

    With `before`, only saves of fewer updates are removed, and others may be running.
    """
    for hidden in directory.glob(".step_*.tmp*"):
        match = _LEFTOVER.fullmatch(hidden.name)
        if match is None or (before is not None and int(match["step"]) >= before):
            continue
        if match["replaced"]:
            bring_back(hidden, directory / match["name"])
        else:
            shutil.rmtree(hidden, ignore_errors=True)


def _wait_for(directory: Path, files: Iterable[str] = ()) -> None:
    """Wait until what other ranks have made is there: a shared file system may show it late. Raises OSError.

    The directory is listed, which costs a file system of many clients less than a question for each file.
    """
    deadline = time.monotonic() + _VISIBLE_SECONDS
    while (missing := _missing(directory, files)) is not None:
        if time.monotonic() > deadline:
            raise OSError(f"rank {rank()} does not see {missing}; all ranks must write to the same directory")
        time.sleep(0.05)


def _missing(directory: Path, files: Iterable[str]) -> Path | None:
    if not directory.exists():
        return directory
    absent = set(files).difference(os.listdir(directory)) if files else ()
    return directory / min(absent) if absent else None
